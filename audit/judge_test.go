package audit_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/sqlite"
)

// A town is a ledger in which repositories are watched, poll after poll.
type town struct {
	t      *testing.T
	store  *sqlite.Store
	policy *audit.Policy
	now    time.Time
}

func newTown(t *testing.T, rules ...audit.RuleText) *town {
	t.Helper()
	store, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "audit.db"), "tidemark.test/log")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	p, errs := audit.Compile(audit.PolicyText{Rules: rules})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	return &town{t, store, p, time.Date(2026, 2, 11, 8, 0, 0, 0, time.UTC)}
}

// poll sees what tags of a repository mean, a second after the other, and returns
// what was recorded.
func (w *town) poll(repository string, meanings ...string) (events []audit.Event) {
	w.t.Helper()
	for i := 0; i < len(meanings); i += 2 {
		w.now = w.now.Add(time.Second)
		ref := audit.Ref{Upstream: "docker.io", Repository: repository, Tag: meanings[i]}
		_, err := w.store.Advance(w.t.Context(), ref, func(r audit.Record) (audit.State, []audit.Event, error) {
			seen := audit.Observation{Digest: audittest.Digest(meanings[i+1]), MediaType: "application/x", Size: 7}
			if r.State.Known() {
				seen.Change = &audit.Comparison{Old: r.State.Head, New: seen.Digest, Class: audit.ClassUnknown}
			}
			st, es := w.policy.Next(ref, r, seen, w.now)
			audit.Identify(&st, es)
			events = append(events, es...)
			return st, es, nil
		})
		if err != nil {
			w.t.Fatal(err)
		}
	}
	audittest.Check(w.t, w.store)
	return events
}

func of(events []audit.Event, kind audit.Type) (out []audit.Event) {
	for _, e := range events {
		if e.Type == kind {
			out = append(out, e)
		}
	}
	return out
}

var (
	kicsBefore = []string{"latest", "20", "v2.1.20", "20", "v2.1.20-debian", "20d", "alpine", "20", "debian", "20d"}
	kicsAfter  = []string{"latest", "evil", "v2.1.20", "evil", "v2.1.20-debian", "evil-d", "alpine", "evil", "debian", "evil-d", "v2.1.21", "evil", "v2.1.21-debian", "evil-d"}
)

// The incident of 2026-04-22 (AUDIT.md, A2): five tags of checkmarx/kics overwritten,
// two new ones, one digest under two full versions. Within one poll it is critical,
// and the signals say why.
func TestKICSIsCriticalWithinOnePoll(t *testing.T) {
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Alert})
	if events := w.poll("checkmarx/kics", kicsBefore...); len(events) != 5 {
		t.Fatalf("%d events at first", len(events))
	}
	w.now = w.now.Add(70 * 24 * time.Hour)
	w.poll("checkmarx/kics", kicsBefore...)
	w.now = w.now.Add(10 * time.Minute)
	events := w.poll("checkmarx/kics", kicsAfter...)
	bursts := of(events, audit.Burst)
	if len(bursts) != 1 || bursts[0].Severity() != audit.Critical || !slices.Equal(bursts[0].Tags, []string{"latest", "v2.1.20", "v2.1.20-debian"}) {
		t.Errorf("bursts: %+v", bursts)
	}
	aliased := of(events, audit.Aliased)
	if len(aliased) != 2 || aliased[0].Ref.Tag != "v2.1.21" || !slices.Equal(aliased[0].Tags, []string{"v2.1.20"}) || aliased[0].Severity() != audit.High {
		t.Errorf("aliases: %+v", aliased)
	}
	signals := make(map[string][]string)
	for _, e := range of(events, audit.Moved) {
		signals[e.Ref.Tag] = e.Signals
	}
	for tag, want := range map[string][]string{
		"v2.1.20":        {"never_moved_before:70d", "full_version_tag", "siblings_moved:1"},
		"v2.1.20-debian": {"never_moved_before:70d", "full_version_tag", "siblings_moved:2", "burst:3"},
		"debian":         {"never_moved_before:70d", "siblings_moved:4", "burst:5"},
	} {
		if !slices.Equal(signals[tag], want) {
			t.Errorf("%s: signals %v, want %v", tag, signals[tag], want)
		}
	}
}

// With a cooldown or immutable nobody ever got it: neither while it stood, nor after
// it was taken back, nor ever after.
func TestKICSIsNeverServed(t *testing.T) {
	yes := true
	for name, rules := range map[string][]audit.RuleText{
		"cooldown":  {{Match: "**", Mode: audit.Cooldown, Age: 72 * time.Hour}},
		"immutable": {{Match: "**", FullVersion: &yes, Mode: audit.Immutable}, {Match: "**", Mode: audit.HoldMode}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newTown(t, rules...)
			check := func(when string) {
				t.Helper()
				for i := 0; i < len(kicsBefore); i += 2 {
					ref := audit.Ref{Upstream: "docker.io", Repository: "checkmarx/kics", Tag: kicsBefore[i]}
					st, err := w.store.State(t.Context(), ref)
					if err != nil || st.Served != audittest.Digest(kicsBefore[i+1]) {
						t.Errorf("%s: %s serves %s, %v", when, ref.Tag, st.Served, err)
					}
				}
			}
			w.poll("checkmarx/kics", kicsBefore...)
			w.now = w.now.Add(70 * 24 * time.Hour)
			w.poll("checkmarx/kics", kicsBefore...)
			for range 4 {
				w.now = w.now.Add(10 * time.Minute)
				w.poll("checkmarx/kics", kicsAfter[:10]...)
				check("while it stands")
			}
			for range 10 {
				w.now = w.now.Add(24 * time.Hour)
				w.poll("checkmarx/kics", kicsBefore...)
				check("after it was taken back")
			}
		})
	}
}

// Where many tags move together, and full versions too, as those of official images
// do with every base image, that is learned, and no burst any more.
func TestCustomsAreLearned(t *testing.T) {
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Alert})
	build := func(base string) []string {
		var out []string
		for _, tag := range []string{"latest", "1.27", "1.27.5", "1.26.3", "alpine"} {
			out = append(out, tag, tag+base)
		}
		return out
	}
	w.poll("library/nginx", build("A")...)
	var told []int
	for _, base := range []string{"B", "C", "D", "E"} {
		w.now = w.now.Add(40 * 24 * time.Hour)
		events := w.poll("library/nginx", build(base)...)
		told = append(told, len(of(events, audit.Burst)))
		if base == "E" {
			for _, e := range events {
				if slices.Contains(e.Signals, "full_version_tag") {
					t.Errorf("%s: signals %v", e.Ref, e.Signals)
				}
			}
		}
	}
	if !slices.Equal(told, []int{1, 1, 0, 0}) {
		t.Errorf("bursts told: %v, want none once it is the custom", told)
	}
	if events := w.poll("library/nginx", "1.27.5", "1.27.5E", "1.27.5-perl", "x", "1.27.4", "y", "2026-07-01", "1.27.5E"); len(of(events, audit.Aliased)) > 0 {
		t.Errorf("a date is another name of a version: %v", events)
	}
}

// Tags that were alike when they were seen first, and changes that no attack hides
// behind, are no sign of anything.
func TestHarmlessLikenessIsNoAlarm(t *testing.T) {
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Alert})
	events := w.poll("acme/app", "1.0.0", "same", "1.0.1", "same", "1.0.0-debian", "same", "latest", "same")
	if len(of(events, audit.Aliased))+len(of(events, audit.Burst)) > 0 {
		t.Errorf("at first sight: %v", events)
	}
	w.now = w.now.Add(40 * 24 * time.Hour)
	for _, tag := range []string{"1.0.0", "1.0.1", "latest"} {
		ref := audit.Ref{Upstream: "docker.io", Repository: "acme/app", Tag: tag}
		_, err := w.store.Advance(t.Context(), ref, func(r audit.Record) (audit.State, []audit.Event, error) {
			seen := audit.Observation{Digest: audittest.Digest("repacked " + tag), MediaType: "application/x", Size: 7}
			seen.Change = &audit.Comparison{Old: r.State.Head, New: seen.Digest, Class: audit.ClassRepackaged}
			st, es := w.policy.Next(ref, r, seen, w.now)
			audit.Identify(&st, es)
			if len(of(es, audit.Burst)) > 0 {
				t.Errorf("%s: %v", tag, es)
			}
			return st, es, nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// What no label says, other tags do: a tag that moves from what is 1.2 to what is 1.3 is
// a release, and back it is none.
func TestOtherTagsTellReleases(t *testing.T) {
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Alert})
	w.poll("acme/app", "latest", "two", "1.2.0", "two", "1.3.0", "three", "1.3.0-rc1", "rc")
	for _, move := range []struct {
		name  string
		class audit.Class
	}{{"three", audit.ClassRelease}, {"other", audit.ClassUnknown}, {"rc", audit.ClassUnknown}, {"two", audit.ClassRollback}} {
		w.now = w.now.Add(time.Hour)
		if e := w.poll("acme/app", "latest", move.name)[0]; e.Class != move.class {
			t.Errorf("to %s: %s, want %s", move.name, e.Class, move.class)
		}
	}
}

// A tag with a rhythm that it suddenly does not keep is worth a word; so are the tags
// that moved beside it.
func TestCadenceAndSiblings(t *testing.T) {
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Alert})
	w.poll("acme/app", "nightly", "0", "other", "0")
	for i := range 8 {
		w.now = w.now.Add(24*time.Hour + time.Duration(i%2)*time.Hour)
		if e := w.poll("acme/app", "nightly", fmt.Sprint(i+1))[0]; len(e.Signals) != 0 {
			t.Errorf("night %d: %v", i, e.Signals)
		}
	}
	w.now = w.now.Add(20 * time.Minute)
	w.poll("acme/app", "other", "1")
	if e := w.poll("acme/app", "nightly", "early")[0]; len(e.Signals) != 2 || !strings.HasPrefix(e.Signals[0], "cadence_z:-") || e.Signals[1] != "siblings_moved:1" || e.Severity() != audit.Notice {
		t.Errorf("early: %v %s", e.Signals, e.Severity())
	}
}

// What nobody gets for a day or more need not be told at once, unless it is more than a
// warning.
func TestHeldForADayIsForTheDigest(t *testing.T) {
	for _, c := range []struct {
		held    time.Duration
		signals string
		want    audit.Severity
	}{
		{72 * time.Hour, "entrypoint_changed", audit.Notice}, {time.Hour, "entrypoint_changed", audit.Warning},
		{72 * time.Hour, "user_to_root", audit.High}, {72 * time.Hour, "burst:3", audit.Critical}, {72 * time.Hour, "ports_changed", audit.Notice},
	} {
		until := noon.Add(c.held)
		e := audit.Event{Type: audit.Held, Time: noon, Class: audit.ClassRelease, Signals: []string{c.signals}, Policy: audit.Effect{Mode: audit.Cooldown, Until: &until}}
		if got := e.Severity(); got != c.want {
			t.Errorf("%s held for %v: %s, want %s", c.signals, c.held, got, c.want)
		}
	}
}

// R8: a move of platforms that nobody here has is nothing to be told of at once, unless it
// is one of many.
func TestR8UnconsumedPlatforms(t *testing.T) {
	e := audit.Event{Type: audit.Moved, Class: audit.ClassUnknown, Signals: []string{"user_to_root", "unconsumed"}}
	if s := e.Severity(); s != audit.Info {
		t.Errorf("nobody has it: %s", s)
	}
	e.Signals = append(e.Signals, "burst:4")
	if s := e.Severity(); s != audit.Critical {
		t.Errorf("one of many: %s", s)
	}
	e.Signals = []string{"user_to_root", "consumed_platform_changed"}
	if s := e.Severity(); s != audit.High {
		t.Errorf("somebody has it: %s", s)
	}
}
