package notify_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/notify"
	"tidemark/audit/sqlite"
)

// A scripted sink notes what it is sent and answers as its script says: the n-th
// attempt with the n-th error, and nil after that. What it takes, and says it did
// not, it has.
type scripted struct {
	mu     sync.Mutex
	script []error
	tries  int
	got    []notify.Message
	at     []time.Time
	block  bool
}

// errTaken is said by a sink that has taken the message nevertheless.
var errTaken = errors.New("connection reset by peer")

func (s *scripted) Send(ctx context.Context, m notify.Message) error {
	if s.block {
		<-ctx.Done()
		return ctx.Err()
	}
	time.Sleep(10 * time.Millisecond)
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	if s.tries < len(s.script) {
		err = s.script[s.tries]
	}
	s.tries++
	if err == nil || errors.Is(err, errTaken) {
		s.got, s.at = append(s.got, m), append(s.at, time.Now())
	}
	return err
}

// so returns how often the sink was tried so far, and what it has since when.
func (s *scripted) so() (tries int, got []notify.Message, at []time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tries, slices.Clone(s.got), slices.Clone(s.at)
}

// house is a ledger with sinks, in the time of a synctest bubble.
type house struct {
	t      *testing.T
	store  *sqlite.Store
	ledger *audit.Ledger
	routes []notify.Route
	d      *notify.Dispatcher
	stop   func()
}

func newHouse(t *testing.T, routes ...notify.Route) *house {
	t.Helper()
	store, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "audit.db"), "tidemark.test/log")
	if err != nil {
		t.Fatal(err)
	}
	h := &house{t: t, store: store, routes: routes}
	h.start()
	return h
}

// start starts a dispatcher, as a new process does.
func (h *house) start() {
	policy, errs := audit.Compile(audit.PolicyText{Rules: []audit.RuleText{{Match: "**/fixed:*", Mode: audit.Immutable}, {Match: "**", Mode: audit.Alert}}})
	if len(errs) > 0 {
		h.t.Fatal(errs)
	}
	var d *notify.Dispatcher
	h.ledger = audit.New(audit.Options{
		Store: h.store, Policy: policy, Log: zerolog.Nop(),
		Notify:   func(e audit.Event) []audit.Recipient { return d.Recipients(e) },
		Recorded: func(int64, audit.Event) { d.Grown() },
	})
	d = notify.New(notify.Options{Outbox: h.store, Routes: h.routes, Origin: "tidemark.test/log", Undelivered: h.ledger.Undelivered, Log: zerolog.Nop()})
	h.d = d
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := d.Run(ctx); err != nil {
			h.t.Error(err)
		}
	})
	h.stop = func() { cancel(); wg.Wait() }
}

func (h *house) close() {
	h.stop()
	if err := h.store.Close(); err != nil {
		h.t.Error(err)
	}
}

// see has the ledger see what a tag means.
func (h *house) see(ref audit.Ref, name string, signals ...string) {
	h.t.Helper()
	_, err := h.ledger.Resolve(context.Background(), ref, func(_ context.Context, q audit.Question) (audit.Observation, error) {
		o := audit.Observation{Digest: audittest.Digest(name), MediaType: "application/x", Size: 7}
		if q.Known.Known() && q.Known.Head != o.Digest {
			o.Change = &audit.Comparison{Old: q.Known.Head, New: o.Digest, Class: audit.ClassUnknown, Signals: signals}
		}
		return o, nil
	})
	if err != nil {
		h.t.Fatal(err)
	}
}

// told are the entries that a sink has, in order, each message once.
func (s *scripted) told() (entries []int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := make(map[string]bool)
	for _, m := range s.got {
		if seen[m.ID] {
			continue
		}
		seen[m.ID] = true
		for _, i := range m.Items {
			entries = append(entries, i.Index)
		}
	}
	return entries
}

func route(name string, s notify.Sink) notify.Route {
	return notify.Route{Name: name, Sink: s, MinSeverity: audit.Notice, ByRepository: true, Wait: 2 * time.Minute, FlapWindow: 15 * time.Minute}
}

// Whatever a sink answers, and however often the process is killed between, it has
// every event exactly once by the message's ID, those about one tag in order; and
// what is sent again after a crash is the same message.
func TestEveryEventArrivesOnce(t *testing.T) {
	failures := map[string][]error{
		"none":             nil,
		"refused":          {errors.New("500"), errors.New("500")},
		"done, told not":   {errTaken, errTaken, nil, errTaken},
		"asks for a while": {&notify.Failure{After: time.Hour, Err: errors.New("429")}},
		"all of it":        {errors.New("500"), errTaken, &notify.Failure{After: time.Minute, Err: errors.New("503")}, errTaken, errors.New("no"), errTaken},
	}
	for name, script := range failures {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &scripted{script: script}
				h := newHouse(t, route("ops", s))
				refs := []audit.Ref{audittest.Ref("a"), audittest.Ref("b"), {Upstream: "ghcr.io", Repository: "x/y", Tag: "1"}}
				want := 0
				for round := range 5 {
					for _, r := range refs {
						h.see(r, fmt.Sprint(r, round))
						if round > 0 {
							want++
						}
					}
					time.Sleep(20 * time.Minute)
					h.stop() // as if it were killed: nothing is told to anyone
					h.start()
				}
				time.Sleep(80 * time.Hour)
				h.close()
				told := s.told()
				if len(told) != want {
					t.Errorf("it was told of %v, want %d events", told, want)
				}
				perRef := make(map[audit.Ref]int64)
				bodies := make(map[string]string)
				for _, m := range s.got {
					if before, again := bodies[m.ID]; again && before != m.Text() {
						t.Errorf("message %s is another the second time", m.ID)
					}
					bodies[m.ID] = m.Text()
				}
				seen := make(map[string]bool)
				for _, m := range s.got {
					if seen[m.ID] {
						continue
					}
					seen[m.ID] = true
					for _, i := range m.Items {
						if i.Index <= perRef[i.Event.Ref] {
							t.Errorf("%s: entry %d after %d", i.Event.Ref, i.Index, perRef[i.Event.Ref])
						}
						perRef[i.Event.Ref] = i.Index
					}
				}
			})
		})
	}
}

// A message that a sink never takes is given up after three days and a quarter, and
// the other sinks are told of that; nobody tells the sink itself.
func TestDeadLettersAreToldElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := &scripted{script: slices.Repeat([]error{errors.New("connection refused")}, 100)}
		other := &scripted{}
		h := newHouse(t, route("down", down), route("other", other))
		h.see(audittest.Ref("a"), "one")
		h.see(audittest.Ref("a"), "two")
		time.Sleep(100 * time.Hour)
		counts, err := h.store.OutboxCounts(t.Context())
		if err != nil || len(counts) != 1 || counts[0] != (audit.OutboxCount{Sink: "down", State: "dead", N: 1}) {
			t.Errorf("the outbox has %v, %v", counts, err)
		}
		h.close()
		if down.tries != 10 {
			t.Errorf("%d attempts, want 10", down.tries)
		}
		last := other.got[len(other.got)-1]
		if e := last.Items[0].Event; e.Type != audit.DeadLetter || e.Dead.Sink != "down" || !slices.Equal(e.Dead.Entries, []int64{1}) || !strings.Contains(last.Title(), "connection refused") {
			t.Errorf("the other sink was told %q, %+v", last.Title(), e.Dead)
		}
	})
}

// A sink whose address is gone is told nothing more until the next start, and what it
// was to be told is kept.
func TestGoneSinkIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &scripted{script: []error{&notify.Failure{Gone: true, Err: errors.New("410 Gone")}}}
		h := newHouse(t, route("ops", s))
		h.see(audittest.Ref("a"), "one")
		h.see(audittest.Ref("a"), "two")
		time.Sleep(50 * time.Hour)
		if tries, _, _ := s.so(); tries != 1 {
			t.Errorf("%d attempts, want 1", tries)
		}
		h.stop()
		h.start()
		time.Sleep(50 * time.Hour)
		h.close()
		if told := s.told(); !slices.Equal(told, []int64{1}) {
			t.Errorf("after the next start it was told of %v", told)
		}
	})
}

// A sink that hangs is in nobody's way: neither of other sinks nor of the ledger.
func TestHangingSinkIsInNobodysWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good := &scripted{}
		h := newHouse(t, route("hangs", &scripted{block: true}), route("good", good))
		began := time.Now()
		h.see(audittest.Ref("a"), "one")
		for i := range 100 {
			h.see(audittest.Ref("a"), fmt.Sprint(i))
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("the ledger waited %v", took)
		}
		time.Sleep(16 * time.Minute)
		h.close()
		if n := len(good.told()); n != 100 {
			t.Errorf("the other sink was told of %d of 100", n)
		}
	})
}

// What is critical is told at once; what else comes within the wait about one
// repository is one message; what is not severe is in the daily digest; and a move
// that is taken back before anybody was told of it is told to nobody.
func TestMessagesAreFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &scripted{}
		r := route("ops", s)
		morning := notify.TimeOfDay(8 * 60)
		r.MinSeverity, r.Digest = audit.Warning, &morning
		h := newHouse(t, r)
		began := time.Now()
		a, b, fixed := audittest.Ref("a"), audittest.Ref("b"), audit.Ref{Upstream: "docker.io", Repository: "library/fixed", Tag: "stable"}
		for _, ref := range []audit.Ref{a, b, fixed} {
			h.see(ref, "one")
		}
		h.see(a, "two", "entrypoint_changed")
		h.see(b, "two", "entrypoint_changed")
		h.see(fixed, "two") // against its rule
		time.Sleep(20 * time.Minute)
		titles := func() (out []string) {
			_, got, at := s.so()
			for i, m := range got {
				out = append(out, fmt.Sprintf("%v %s", at[i].Sub(began).Round(time.Minute), m.Title()))
			}
			return out
		}
		if got := titles(); len(got) != 2 || !strings.HasPrefix(got[0], "0s [critical] docker.io/library/fixed:stable moved, against the policy") || got[1] != "15m0s [warning] 2 events about docker.io/library/app" {
			t.Fatalf("told: %s", strings.Join(got, "\n"))
		}
		h.see(a, "three") // nothing to be woken for
		time.Sleep(time.Hour)
		h.see(b, "three", "entrypoint_changed")
		time.Sleep(5 * time.Minute)
		h.see(b, "two") // and back
		if got := titles(); len(got) != 2 {
			t.Errorf("told besides: %v", got[2:])
		}
		time.Sleep(25 * time.Hour)
		h.close()
		got := titles()
		if len(got) != 3 || !strings.HasSuffix(got[2], "tidemark: daily digest, 1 event") { // what a was
			t.Errorf("told: %s\n%s", strings.Join(got, "\n"), s.got[len(s.got)-1].Text())
		}
	})
}

// Of what a sink is told, and when.
func TestRoutes(t *testing.T) {
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.Local)
	morning := notify.TimeOfDay(8 * 60)
	moved := audit.Event{Type: audit.Moved, Time: now, Ref: audittest.Ref("a"), Class: audit.ClassRollback, Policy: audit.Effect{Mode: audit.Alert}}
	with := func(change func(*audit.Event)) audit.Event { e := moved; change(&e); return e }
	base := notify.Route{Name: "ops", MinSeverity: audit.Warning, Wait: 2 * time.Minute, FlapWindow: 15 * time.Minute}
	digested := base
	digested.Digest = &morning
	elsewhere, err := audit.ParseGlob("ghcr.io/**")
	if err != nil {
		t.Fatal(err)
	}
	other := base
	other.Match = elsewhere
	moved.ID = uuid.New()
	moves := base
	moves.Types = map[audit.Type]bool{audit.Moved: true}
	only := base
	only.Types = map[audit.Type]bool{audit.Held: true}
	for name, c := range map[string]struct {
		route notify.Route
		event audit.Event
		want  time.Duration // after now, -1 for never
	}{
		"a move waits until it can no longer be taken back": {base, moved, 15 * time.Minute},
		"and so does what is held of it":                    {base, with(func(e *audit.Event) { e.Type = audit.Held }), 15 * time.Minute},
		"a move that is held is told as held": {base, with(func(e *audit.Event) {
			e.New, e.Policy.Served = &audit.Content{Digest: audittest.Digest("new")}, audittest.Digest("old")
		}), -1},
		"unless nobody wants to know what is held": {moves, with(func(e *audit.Event) {
			e.New, e.Policy.Served = &audit.Content{Digest: audittest.Digest("new")}, audittest.Digest("old")
		}), 15 * time.Minute},
		"what was taken back at once is one flap": {base, with(func(e *audit.Event) { e.Type, e.Reason, e.Flapped = audit.Withdrawn, "reverted", e.ID }), -1},
		"what is critical does not wait":          {base, with(func(e *audit.Event) { e.Type = audit.Violation }), 0},
		"what is observed is for the record":      {base, with(func(e *audit.Event) { e.Policy.Mode = audit.Observe }), -1},
		"another login is no move":                {base, with(func(e *audit.Event) { e.Rebaseline = true }), -1},
		"an index that grew was told of before":   {base, with(func(e *audit.Event) { e.Amends = &e.ID }), -1},
		"the first sight is a baseline":           {base, with(func(e *audit.Event) { e.Type = audit.FirstSeen }), -1},
		"an import is a baseline":                 {base, with(func(e *audit.Event) { e.Evidence.Trigger = audit.TriggerImport }), -1},
		"another repository is another's":         {other, moved, -1},
		"other types are another's":               {only, moved, -1},
		"what is not severe is not told":          {base, with(func(e *audit.Event) { e.Class = audit.ClassRebuild }), -1},
		"or with the digest, tomorrow at eight":   {digested, with(func(e *audit.Event) { e.Class = audit.ClassRebuild }), 20 * time.Hour},
		"its own dead letters are not":            {base, audit.Event{Type: audit.DeadLetter, Time: now, Dead: &audit.Undelivered{Sink: "ops"}}, -1},
		"dead letters of others are":              {base, audit.Event{Type: audit.DeadLetter, Time: now, Dead: &audit.Undelivered{Sink: "log"}}, 0},
	} {
		got := notify.Recipients([]notify.Route{c.route}, c.event)
		switch {
		case c.want < 0 && len(got) > 0:
			t.Errorf("%s: told at %v", name, got[0].At)
		case c.want >= 0 && (len(got) != 1 || !got[0].At.Equal(now.Add(c.want))):
			t.Errorf("%s: %v, want %v later", name, got, c.want)
		}
	}
}

// What is open is told again after a time, as another message, until somebody
// acknowledges it or it is over, and over a restart.
func TestWhatIsOpenIsToldAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &scripted{}
		r := route("ops", s)
		r.MinSeverity, r.Remind = audit.Warning, 24*time.Hour
		h := newHouse(t, r)
		defer func() { h.close() }()
		fixed, other := audit.Ref{Upstream: "docker.io", Repository: "library/fixed", Tag: "1"}, audit.Ref{Upstream: "docker.io", Repository: "library/fixed", Tag: "2"}
		for _, ref := range []audit.Ref{fixed, other} {
			h.see(ref, "one")
			h.see(ref, "two")
		}
		count := func(when string, messages, reminders int) {
			t.Helper()
			_, got, _ := s.so()
			ids := make(map[string]bool)
			n := 0
			for _, m := range got {
				ids[m.ID] = true
				if m.Reminder > 0 {
					n++
					if !strings.HasSuffix(m.Title(), ", still open") || !strings.Contains(m.Text(), "tidemark notify ack INDEX") {
						t.Errorf("a reminder: %s\n%s", m.Title(), m.Text())
					}
				}
			}
			if len(got) != messages || n != reminders || len(ids) != messages {
				t.Errorf("%s: %d messages, %d of them reminders, %d IDs; want %d, %d", when, len(got), n, len(ids), messages, reminders)
			}
		}
		time.Sleep(23 * time.Hour)
		count("before a day is over", 2, 0)
		time.Sleep(2 * time.Hour)
		count("after a day", 3, 1) // one of both
		h.stop()
		h.start()
		time.Sleep(24 * time.Hour)
		count("after two, and a restart", 4, 2)
		open, err := h.store.Alerts(context.Background(), false, 10)
		if err != nil || len(open) != 2 {
			t.Fatalf("open: %+v, %v", open, err)
		}
		if _, err := h.ledger.Acknowledge(context.Background(), h.store, open[0].Index, "we know"); err != nil {
			t.Fatal(err)
		}
		if _, err := h.ledger.Acknowledge(context.Background(), h.store, 0, "x"); !errors.Is(err, audit.ErrNoAlert) {
			t.Errorf("acknowledged what is no alert: %v", err)
		}
		time.Sleep(24 * time.Hour)
		count("after three, one acknowledged", 5, 3)
		if _, got, _ := s.so(); len(got[4].Items) != 1 {
			t.Errorf("reminded of %d", len(got[4].Items))
		}
		h.see(fixed, "one") // back again: it is over
		h.see(other, "one")
		time.Sleep(72 * time.Hour)
		if _, got, _ := s.so(); slices.ContainsFunc(got[5:], func(m notify.Message) bool { return m.Reminder > 0 }) {
			t.Error("reminded of what is over")
		}
	})
}

// What is muted is on the record and told to nobody, not even if it is critical, until
// the time is over; then it can be told with notify replay.
func TestMuted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &scripted{}
		h := newHouse(t, route("ops", s))
		defer h.close()
		fixed := audit.Ref{Upstream: "docker.io", Repository: "library/fixed", Tag: "1"}
		h.see(fixed, "one")
		g, err := audit.ParseGlob("docker.io/library/fixed:*")
		if err != nil {
			t.Fatal(err)
		}
		if err := h.ledger.Mute(context.Background(), audit.Mute{Match: g, Until: time.Now().Add(time.Hour)}); !errors.Is(err, audit.ErrReason) {
			t.Errorf("muted without a reason: %v", err)
		}
		if err := h.ledger.Mute(context.Background(), audit.Mute{Match: g, Until: time.Now().Add(time.Hour), Reason: "moving"}); err != nil {
			t.Fatal(err)
		}
		mutes, err := h.store.Mutes(context.Background(), time.Now())
		if err != nil || len(mutes) != 1 {
			t.Fatalf("%v, %v", mutes, err)
		}
		h.d.Mute(mutes)
		h.see(fixed, "two")
		h.see(audittest.Ref("a"), "one")
		h.see(audittest.Ref("a"), "two", "user_to_root")
		time.Sleep(30 * time.Minute)
		if _, got, _ := s.so(); len(got) != 1 || got[0].Items[0].Event.Ref != audittest.Ref("a") {
			t.Errorf("told %d messages", len(got))
		}
		time.Sleep(time.Hour)
		h.see(fixed, "three")
		time.Sleep(30 * time.Minute)
		if _, got, _ := s.so(); len(got) < 2 {
			t.Error("not told after the mute was over")
		}
	})
}

// In quiet hours what is not critical waits for their end.
func TestQuietHours(t *testing.T) {
	at := func(clock string) time.Time {
		c, err := time.ParseInLocation("2006-01-02 15:04", clock, time.Local)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for _, c := range []struct{ hours, at, want string }{
		{"22:00-07:00", "2026-07-01 21:59", "2026-07-01 21:59"},
		{"22:00-07:00", "2026-07-01 22:00", "2026-07-02 07:00"},
		{"22:00-07:00", "2026-07-02 03:00", "2026-07-02 07:00"},
		{"22:00-07:00", "2026-07-02 07:00", "2026-07-02 07:00"},
		{"12:00-13:00", "2026-07-01 12:30", "2026-07-01 13:00"},
	} {
		h, err := notify.ParseHours(c.hours)
		if err != nil || !h.End(at(c.at)).Equal(at(c.want)) {
			t.Errorf("%s at %s: %v, %v; want %s", c.hours, c.at, h.End(at(c.at)), err, c.want)
		}
	}
	for _, bad := range []string{"", "22-7", "22:00", "22:00-22:00", "25:00-01:00", "22:00-07:00-08:00"} {
		if _, err := notify.ParseHours(bad); err == nil {
			t.Errorf("%q was taken for hours", bad)
		}
	}
	quiet, err := notify.ParseHours("22:00-07:00")
	if err != nil {
		t.Fatal(err)
	}
	r := notify.Route{Name: "ops", MinSeverity: audit.Warning, Wait: 2 * time.Minute, Quiet: quiet}
	e := audit.Event{Type: audit.Deleted, Time: at("2026-07-01 23:00"), Ref: audittest.Ref("a")}
	if got := notify.Recipients([]notify.Route{r}, e); len(got) != 1 || !got[0].At.Equal(at("2026-07-02 07:00")) {
		t.Errorf("a warning at night: %v", got)
	}
	e.Type = audit.Violation
	if got := notify.Recipients([]notify.Route{r}, e); len(got) != 1 || !got[0].At.Equal(e.Time) {
		t.Errorf("what is critical: %v", got)
	}
}

// trouble is an error of an upstream.
type trouble string

func (t trouble) Error() string     { return "upstream: " + string(t) }
func (t trouble) Condition() string { return string(t) }

// That an upstream is in trouble is told, and that it is well again; not what was over
// before it was worth telling.
func TestConditionsAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &scripted{}
		h := newHouse(t, route("ops", s))
		defer h.close()
		c := audit.NewConditions(audit.ConditionOptions{Store: h.store, Notify: h.d.Recipients, Told: h.d.Grown, Log: zerolog.Nop()})
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := c.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		defer func() { cancel(); wg.Wait() }()
		fail := func(d time.Duration) {
			for range 3 {
				c.Answered("ghcr.io", trouble(audit.Degraded))
			}
			time.Sleep(d)
			c.Answered("ghcr.io", nil)
			time.Sleep(time.Hour)
		}
		fail(5 * time.Minute)
		if tries, _, _ := s.so(); tries != 0 {
			t.Errorf("over at once, and told %d times", tries)
		}
		fail(2 * time.Hour)
		_, got, _ := s.so()
		if len(got) != 2 || !strings.HasPrefix(got[0].Title(), "[warning] ghcr.io is in trouble since ") || got[1].Title() != "[warning] ghcr.io is well again, after 2h0m0s" || strings.Contains(got[0].Text(), "tidemark show") {
			t.Fatalf("told %d: %+v", len(got), got)
		}
		if got[0].Items[0].CloudEvent("x").Type != "dev.tidemark.upstream.degraded.v1" {
			t.Errorf("told as %+v", got[0].Items[0].CloudEvent("x"))
		}
	})
}
