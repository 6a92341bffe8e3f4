// Package audittest holds what every ledger store must do, as tests.
//
//	func TestStore(t *testing.T) {
//		audittest.Run(t, func(t *testing.T, dir string) audittest.Store { … })
//	}
package audittest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/taglog"
)

// A Store is what is tested: both sides of a ledger's store, and its leaves.
type Store interface {
	audit.Store
	audit.Log
	audit.Memory
	audit.Leaves
	audit.Lister
	audit.ExposureStore
	audit.ConditionStore
	audit.Forker
	Events(ctx context.Context, q audit.EventQuery) ([]audit.Entry, error)
	Tags(ctx context.Context, q audit.TagQuery) ([]audit.Tag, error)
	History(ctx context.Context, ref audit.Ref, q audit.HistoryQuery) ([]audit.Stint, error)
	RefOf(ctx context.Context, d digest.Digest) (audit.Ref, error)
	HeldRefs(ctx context.Context) (int64, error)
	Keep(ctx context.Context, digests int, since time.Time) iter.Seq2[audit.Kept, error]
	Exposures(ctx context.Context, d digest.Digest) ([]audit.Exposure, error)
	Conditions(ctx context.Context, limit int) ([]audit.Condition, error)
	audit.Importer
	audit.PinStore
	audit.ClaimStore
	Chronicle(ctx context.Context, ref audit.Ref) (audit.Chronicle, error)
	EachEvent(ctx context.Context, from map[audit.Ref]int64, end int64) iter.Seq2[audit.Entry, error]
	TagNamesAt(ctx context.Context, upstream, repository string, m audit.Moment) ([]string, error)
	TrustedKey(ctx context.Context, origin string) (string, error)
	AddReferrers(ctx context.Context, upstream, repository string, list []audit.Referrer) error
	Referrers(ctx context.Context, upstream, repository string, subject digest.Digest) ([]audit.Referrer, error)
	audit.Outbox
	audit.AlertStore
	AlertCounts(ctx context.Context) (map[audit.Type]int64, error)
	OutboxCounts(ctx context.Context) ([]audit.OutboxCount, error)
	Requeue(ctx context.Context, sink string, indexes []int64, now time.Time) error
	Pulled(ctx context.Context, since time.Time) ([]audit.Pulled, error)
	Known(ctx context.Context) ([]audit.Ref, error)
	Moves(ctx context.Context, ref audit.Ref) (moves int, since time.Time, err error)
	Close() error
}

// Run tests the stores that open returns. Called twice with the same dir it
// stands for a process and the next one.
func Run(t *testing.T, open func(t *testing.T, dir string) Store) {
	for name, test := range map[string]func(*testing.T, func() Store){
		"a move is all or nothing, and survives":           moveSurvives,
		"a decision that changes nothing appends nothing":  nothingAppended,
		"history knows which event a digest left by":       historyKnows,
		"moves of many refs at once are numbered in order": concurrent,
		"an abandoned move leaves nothing":                 abandoned,
		"confirmations only go forward":                    confirmations,
		"there is one checkpoint for each size":            checkpoints,
		"events are found by ref, type and time":           events,
		"tags are found by pattern, page by page":          tags,
		"a state is read back as it was written":           stateSurvives,
		"what became of a digest is known when it returns": verdicts,
		"a decision that is refused leaves nothing":        refused,
		"an event about no tag takes its place":            aboutNoTag,
		"history is what the events say":                   historyOfRef,
		"what is kept: what is held, and the newest":       kept,
		"small facts are remembered":                       memory,
		"exposures add up, and are forgotten":              exposures,
		"conditions end":                                   conditions,
		"a fork begins another series of checkpoints":      fork,
		"an import is all or nothing, and happens once":    imports,
		"a later import goes on where an earlier ended":    importsGoOn,
		"pins are kept until they are taken back":          pins,
		"claims are kept by whose word they are":           claims,
		"referrers are known by their subject":             referrers,
		"tags are known as of a moment":                    tagsAt,
		"letters are sent once, whatever happens":          outbox,
		"there and back is told to nobody":                 flaps,
		"an alert is open until something ends it":         alerts,
		"a condition is told, unless it was over at once":  notices,
		"what a ref meant before is known":                 former,
		"who pulls what, and what moves how often":         cadence,
		"events of many refs come in order":                eventsOfRefs,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			test(t, func() Store {
				s := open(t, dir)
				t.Cleanup(func() { s.Close() })
				return s
			})
		})
	}
}

// Ref is the ref of a tag in a repository that tests use.
func Ref(tag string) audit.Ref {
	return audit.Ref{Upstream: "docker.io", Repository: "library/app", Tag: tag}
}

// Digest is a digest that stands for a name.
func Digest(name string) digest.Digest { return digest.FromString(name) }

// Move records that ref's head is now the digest of name.
func Move(ctx context.Context, s audit.Store, ref audit.Ref, name string, now time.Time) (audit.State, error) {
	return Advance(ctx, s, ref, nil, audit.Observation{Digest: Digest(name), MediaType: "application/x", Size: 7}, now)
}

// Advance records what p makes of an observation.
func Advance(ctx context.Context, s audit.Store, ref audit.Ref, p *audit.Policy, seen audit.Observation, now time.Time) (audit.State, error) {
	return s.Advance(ctx, ref, func(r audit.Record) (audit.State, []audit.Event, error) {
		st, events := p.Next(ref, r, seen, now)
		audit.Identify(&st, events)
		return st, events, nil
	})
}

func mustMove(t *testing.T, s audit.Store, ref audit.Ref, name string, now time.Time) audit.State {
	t.Helper()
	st, err := Move(t.Context(), s, ref, name, now)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// Check verifies the whole log from its leaves on: every hash, the root, and
// the chain of every ref. It returns the events.
func Check(t *testing.T, s Store) []audit.Event {
	t.Helper()
	tree, err := s.Tree(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	leaves, err := s.Leaves(t.Context(), 0, tree.N)
	if err != nil {
		t.Fatal(err)
	}
	var hashes []tlog.Hash // what the leaves make, whatever is stored
	own := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			out[i] = hashes[x]
		}
		return out, nil
	})
	var events []audit.Event
	heads := make(map[audit.Ref]digest.Digest)
	for i, leaf := range leaves {
		hs, err := tlog.StoredHashes(int64(i), leaf, own)
		if err != nil {
			t.Fatal(err)
		}
		hashes = append(hashes, hs...)
		e, err := audit.ParseLeaf(leaf)
		if err != nil {
			t.Fatal(err)
		}
		events = append(events, e)
		if !e.Type.Moves() {
			continue
		}
		if old := heads[e.Ref]; (old == "") != (e.Old == nil) || e.Old != nil && e.Old.Digest != old {
			t.Errorf("entry %d of %s does not begin where the one before ended", i, e.Ref)
		}
		heads[e.Ref] = e.New.Digest
	}
	if err := taglog.Check(tree, own); err != nil {
		t.Errorf("the leaves do not make the root: %v", err)
	}
	if err := taglog.Check(tree, s); err != nil {
		t.Errorf("the stored hashes do not make the root: %v", err)
	}
	for ref, head := range heads {
		if st, err := s.State(t.Context(), ref); err != nil || st.Head != head {
			t.Errorf("state of %s has head %s, %v; its last event says %s", ref, st.Head, err, head)
		}
	}
	return events
}

var start = time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)

func moveSurvives(t *testing.T, open func() Store) {
	s, ref := open(), Ref("1")
	if st, err := s.State(t.Context(), ref); err != nil || st.Known() {
		t.Errorf("State before = %v, %v; want an unknown ref", st, err)
	}
	for i := range 300 { // beyond a full tile
		st := mustMove(t, s, ref, fmt.Sprint(i), start.Add(time.Duration(i)*time.Minute))
		if st.Index != int64(i) || st.Served != Digest(fmt.Sprint(i)) {
			t.Fatalf("move %d: index %d, served %s", i, st.Index, st.Served)
		}
		if i%50 == 0 {
			Check(t, s)
		}
	}
	s.Close()
	s = open()
	if n := len(Check(t, s)); n != 300 {
		t.Errorf("%d events after reopening, want 300", n)
	}
	st, err := s.State(t.Context(), ref)
	if err != nil || st.Head != Digest("299") || !st.HeadSince.Equal(start.Add(299*time.Minute)) || st.HeadMediaType != "application/x" || st.HeadSize != 7 || st.Index != 299 {
		t.Errorf("State after reopening = %+v, %v", st, err)
	}
}

func nothingAppended(t *testing.T, open func() Store) {
	s, ref := open(), Ref("1")
	mustMove(t, s, ref, "a", start)
	st := mustMove(t, s, ref, "a", start.Add(time.Hour))
	if n := len(Check(t, s)); n != 1 || st.Index != 0 || !st.LastConfirmed.Equal(start.Add(time.Hour)) {
		t.Errorf("%d events, state %+v; want one event, confirmed an hour later", n, st)
	}
}

func historyKnows(t *testing.T, open func() Store) {
	s, ref := open(), Ref("1")
	mustMove(t, s, Ref("other"), "a", start)
	for i, name := range []string{"a", "b", "c", "b", "a"} {
		mustMove(t, s, ref, name, start.Add(time.Duration(i)*time.Hour))
	}
	var got []audit.Type
	events := Check(t, s)[1:]
	for _, e := range events {
		got = append(got, e.Type)
	}
	want := []audit.Type{audit.FirstSeen, audit.Moved, audit.Moved, audit.Reverted, audit.Reverted}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("events are %v, want %v", got, want)
	}
	for i, by := range map[int]int{3: 2, 4: 1} { // b was left by the move to c, a by the move to b
		if r := events[i].RevertsEvent; r == nil || *r != events[by].ID {
			t.Errorf("event %d reverts %v, want %v", i, r, events[by].ID)
		}
	}
}

func concurrent(t *testing.T, open func() Store) {
	s := open()
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 10 {
				if _, err := Move(t.Context(), s, Ref(fmt.Sprint(i)), fmt.Sprint(g), start); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := len(Check(t, s)); n != 80 {
		t.Errorf("%d events, want 80", n)
	}
}

func abandoned(t *testing.T, open func() Store) {
	s, ref := open(), Ref("1")
	mustMove(t, s, ref, "a", start)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.Advance(ctx, ref, func(r audit.Record) (audit.State, []audit.Event, error) {
		cancel() // the process is told to stop in the middle
		var p *audit.Policy
		st, events := p.Next(ref, r, audit.Observation{Digest: Digest("b")}, start.Add(time.Hour))
		audit.Identify(&st, events)
		return st, events, nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Advance = %v, want the context's error", err)
	}
	if n := len(Check(t, s)); n != 1 {
		t.Errorf("%d events, want 1", n)
	}
	if st := mustMove(t, s, ref, "c", start.Add(2*time.Hour)); st.Index != 1 {
		t.Errorf("the next event has index %d, want 1", st.Index)
	}
	Check(t, s)
}

func confirmations(t *testing.T, open func() Store) {
	s, ref := open(), Ref("1")
	mustMove(t, s, ref, "a", start)
	for _, d := range []time.Duration{time.Hour, 30 * time.Minute} {
		if err := s.Confirm(t.Context(), map[audit.Ref]time.Time{ref: start.Add(d), Ref("unknown"): start}); err != nil {
			t.Fatal(err)
		}
	}
	if st, err := s.State(t.Context(), ref); err != nil || !st.LastConfirmed.Equal(start.Add(time.Hour)) {
		t.Errorf("last confirmed %v, %v; want %v", st.LastConfirmed, err, start.Add(time.Hour))
	}
	if st, err := s.State(t.Context(), Ref("unknown")); err != nil || st.Known() {
		t.Errorf("a confirmation made a ref known: %+v, %v", st, err)
	}
	mustMove(t, s, ref, "b", start.Add(2*time.Hour))
	if e := Check(t, s)[1]; !e.Interval.NotBefore.Equal(start.Add(time.Hour)) {
		t.Errorf("the move happened after %v, want after the last confirmation", e.Interval.NotBefore)
	}
}

func checkpoints(t *testing.T, open func() Store) {
	s := open()
	if note, err := s.Checkpoint(t.Context()); err != nil || note != nil {
		t.Errorf("Checkpoint = %q, %v; want none", note, err)
	}
	save := func(n int64, root, note string) error {
		return s.SaveCheckpoint(t.Context(), tlog.Tree{N: n, Hash: tlog.RecordHash([]byte(root))}, []byte(note), start)
	}
	for _, err := range []error{save(1, "x", "one"), save(2, "y", "two"), save(2, "y", "two again")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if save(2, "z", "forged") == nil {
		t.Error("two roots were saved for one size")
	}
	if note, err := open().Checkpoint(t.Context()); err != nil || string(note) != "two again" {
		t.Errorf("Checkpoint = %q, %v", note, err)
	}
}

func events(t *testing.T, open func() Store) {
	s := open()
	for i, tag := range []string{"1", "2", "1", "2", "1"} {
		mustMove(t, s, Ref(tag), fmt.Sprint(i), start.Add(time.Duration(i)*time.Hour))
	}
	ref, two := Ref("1"), int64(2)
	for _, tt := range []struct {
		name string
		q    audit.EventQuery
		want []int64
	}{
		{"all", audit.EventQuery{}, []int64{0, 1, 2, 3, 4}},
		{"newest first", audit.EventQuery{Descending: true, Limit: 2}, []int64{4, 3}},
		{"of a ref", audit.EventQuery{Ref: &ref}, []int64{0, 2, 4}},
		{"of a type", audit.EventQuery{Type: audit.FirstSeen}, []int64{0, 1}},
		{"since", audit.EventQuery{Since: start.Add(3 * time.Hour)}, []int64{3, 4}},
		{"until", audit.EventQuery{Until: start.Add(2 * time.Hour)}, []int64{0, 1}},
		{"next page", audit.EventQuery{After: &two}, []int64{3, 4}},
		{"next page, newest first", audit.EventQuery{After: &two, Descending: true}, []int64{1, 0}},
	} {
		entries, err := s.Events(t.Context(), tt.q)
		var got []int64
		for _, e := range entries {
			got = append(got, e.Index)
		}
		if err != nil || fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("%s: %v, %v; want %v", tt.name, got, err, tt.want)
		}
	}
	if leaves, err := s.Leaves(t.Context(), 4, 2); err == nil {
		t.Errorf("Leaves beyond the end = %d leaves, want an error", len(leaves))
	}
}

func tags(t *testing.T, open func() Store) {
	s := open()
	for i, tag := range []string{"b", "a", "c"} {
		mustMove(t, s, Ref(tag), "before", start.Add(-time.Hour))
		mustMove(t, s, Ref(tag), tag, start.Add(time.Duration(i)*time.Hour))
	}
	mustMove(t, s, Ref("d"), "first", start.Add(3*time.Hour)) // seen, not moved
	glob := func(p string) audit.Glob {
		g, err := audit.ParseGlob(p)
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	for _, tt := range []struct {
		name string
		q    audit.TagQuery
		want string
	}{
		{"all, sorted", audit.TagQuery{}, "[a b c d]"},
		{"pattern", audit.TagQuery{Match: glob("docker.io/*/app:?")}, "[a b c d]"},
		{"any", audit.TagQuery{Match: glob("**:b")}, "[b]"},
		{"moved since", audit.TagQuery{MovedSince: start.Add(time.Hour)}, "[a c]"},
		{"next page", audit.TagQuery{After: Ref("a"), Limit: 1}, "[b]"},
	} {
		found, err := s.Tags(t.Context(), tt.q)
		got := []string{}
		for _, f := range found {
			got = append(got, f.Ref.Tag)
		}
		if err != nil || fmt.Sprint(got) != tt.want {
			t.Errorf("%s: %v, %v; want %v", tt.name, got, err, tt.want)
		}
	}
}

// holding is a policy that holds everything.
func holding(t *testing.T) *audit.Policy {
	t.Helper()
	p, errs := audit.Compile(audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: audit.Cooldown, Age: 24 * time.Hour}}})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	return p
}

func observe(t *testing.T, s Store, ref audit.Ref, p *audit.Policy, seen audit.Observation, now time.Time) audit.State {
	t.Helper()
	st, err := Advance(t.Context(), s, ref, p, seen, now)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func say(name string) audit.Observation {
	return audit.Observation{Digest: Digest(name), MediaType: "application/x", Size: 7, Evidence: audit.Evidence{AcceptProfile: "canonical-1", Identity: "anonymous", Edge: "fra"}}
}

func stateSurvives(t *testing.T, open func() Store) {
	s, ref, p := open(), Ref("1"), holding(t)
	observe(t, s, ref, p, say("a"), start)
	observe(t, s, ref, p, say("b"), start.Add(time.Hour))
	observe(t, s, ref, p, say("c"), start.Add(2*time.Hour))
	want := observe(t, s, ref, p, audit.Observation{Absent: fs.ErrNotExist}, start.Add(3*time.Hour))
	if len(want.Candidates) != 2 || want.Behind == nil || want.Flap == nil || want.Move == nil || want.Missing == nil || want.ServedSize != 7 {
		t.Fatalf("the story does not fill the state: %+v", want)
	}
	if got, err := open().State(t.Context(), ref); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("read back as\n%+v, %v\nwant\n%+v", got, err, want)
	}
	n, err := s.HeldRefs(t.Context())
	yes, no := true, false
	held, err2 := s.Tags(t.Context(), audit.TagQuery{Held: &yes})
	free, err3 := s.Tags(t.Context(), audit.TagQuery{Held: &no})
	if n != 1 || len(held) != 1 || len(free) != 0 || errors.Join(err, err2, err3) != nil {
		t.Errorf("%d held, %d listed as held and %d as not, %v", n, len(held), len(free), errors.Join(err, err2, err3))
	}
	Check(t, s)
}

func verdicts(t *testing.T, open func() Store) {
	s, ref, p := open(), Ref("1"), holding(t)
	decide := func(d audit.Decision, now time.Time) {
		t.Helper()
		_, err := s.Advance(t.Context(), ref, func(r audit.Record) (audit.State, []audit.Event, error) {
			st, events, err := p.Decide(ref, r, d, now)
			audit.Identify(&st, events)
			return st, events, err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	past := func(name string) (past audit.Past, was bool) {
		t.Helper()
		_, err := s.Advance(t.Context(), ref, func(r audit.Record) (audit.State, []audit.Event, error) {
			past, was = r.Past(Digest(name))
			return r.State, nil, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return past, was
	}
	observe(t, s, ref, p, say("a"), start)
	observe(t, s, ref, p, say("b"), start.Add(time.Hour))
	observe(t, s, ref, p, say("a"), start.Add(2*time.Hour))
	observe(t, s, ref, p, say("c"), start.Add(3*time.Hour))
	decide(audit.Decision{Action: audit.Reject, Digest: Digest("c"), Reason: "r"}, start.Add(4*time.Hour))
	observe(t, s, ref, p, say("b"), start.Add(5*time.Hour))
	if c, was := past("c"); !was || !c.Rejected || c.MediaType != "application/x" || c.Size != 7 {
		t.Errorf("c was %t: %+v; want rejected", was, c)
	}
	if _, was := past("never"); was {
		t.Error("what never was is told as having been")
	}
	decide(audit.Decision{Action: audit.Approve, Digest: Digest("b"), Reason: "r"}, start.Add(6*time.Hour))
	observe(t, s, ref, p, say("d"), start.Add(7*time.Hour))
	if b, was := past("b"); !was || b.Withdrawn != "" {
		t.Errorf("b was %t: %+v; want forgiven by its approval", was, b)
	}
	Check(t, s)
}

func refused(t *testing.T, open func() Store) {
	s, ref := open(), Ref("1")
	mustMove(t, s, ref, "a", start)
	no := errors.New("no")
	_, err := s.Advance(t.Context(), ref, func(r audit.Record) (audit.State, []audit.Event, error) {
		if !r.Last.Equal(start) {
			t.Errorf("the newest entry is of %v, want %v", r.Last, start)
		}
		return audit.State{}, nil, no
	})
	if !errors.Is(err, no) {
		t.Errorf("Advance = %v, want the decision's error", err)
	}
	_, err = s.Advance(t.Context(), Ref("new"), func(audit.Record) (audit.State, []audit.Event, error) { return audit.State{}, nil, no })
	if st, serr := s.State(t.Context(), Ref("new")); !errors.Is(err, no) || serr != nil || st.Known() {
		t.Errorf("a new ref: %v, %+v, %v", err, st, serr)
	}
	if n := len(Check(t, s)); n != 1 {
		t.Errorf("%d events, want 1", n)
	}
}

func aboutNoTag(t *testing.T, open func() Store) {
	s := open()
	mustMove(t, s, Ref("1"), "a", start)
	e := audit.Event{ID: uuid.Must(uuid.NewV7()), Type: audit.Action, Time: start, Operator: &audit.Operator{Action: "policy.changed"}}
	if index, err := s.Append(t.Context(), e); err != nil || index != 1 {
		t.Errorf("Append = %d, %v; want 1", index, err)
	}
	if index, err := s.Append(t.Context(), e); err == nil {
		t.Errorf("an event was recorded twice, as %d", index)
	}
	mustMove(t, s, Ref("1"), "b", start.Add(time.Hour))
	if got := Check(t, s); len(got) != 3 || got[1].Ref != (audit.Ref{}) {
		t.Errorf("events are %+v", got)
	}
	if tags, err := s.Tags(t.Context(), audit.TagQuery{}); err != nil || len(tags) != 1 {
		t.Errorf("%d tags, %v", len(tags), err)
	}
}

func historyOfRef(t *testing.T, open func() Store) {
	s, ref := open(), Ref("1")
	mustMove(t, s, Ref("other"), "x", start)
	for i, name := range []string{"a", "b", "a"} {
		mustMove(t, s, ref, name, start.Add(time.Duration(i)*time.Hour))
	}
	if err := s.Confirm(t.Context(), map[audit.Ref]time.Time{ref: start.Add(5 * time.Hour)}); err != nil {
		t.Fatal(err)
	}
	got, err := s.History(t.Context(), ref, audit.HistoryQuery{})
	if err != nil || len(got) != 3 {
		t.Fatalf("%d stints, %v", len(got), err)
	}
	if n := got[0]; n.Digest != Digest("a") || n.Ended != nil || !n.LastConfirmed.Equal(start.Add(5*time.Hour)) || n.Index != 3 || n.Basis != "observed" || n.Size != 7 {
		t.Errorf("the newest is %+v", n)
	}
	if b := got[1]; b.Digest != Digest("b") || b.EndReason != "tag.reverted" || !b.Ended.Equal(start.Add(2*time.Hour)) || !b.NotBefore.Equal(start) {
		t.Errorf("the one before is %+v", b)
	}
	if first := got[2]; first.NotBefore != nil || first.EndReason != "tag.moved" {
		t.Errorf("the first is %+v", first)
	}
	page, err := s.History(t.Context(), ref, audit.HistoryQuery{Before: &got[0].Index, Limit: 1})
	if err != nil || len(page) != 1 || page[0].Index != got[1].Index {
		t.Errorf("the next page is %+v, %v", page, err)
	}
	if early, err := s.History(t.Context(), ref, audit.HistoryQuery{SeenBefore: start.Add(time.Hour)}); err != nil || len(early) != 1 || early[0].Index != got[2].Index {
		t.Errorf("first seen before the second: %+v, %v", early, err)
	}
	if r, err := s.RefOf(t.Context(), Digest("b")); err != nil || r != ref {
		t.Errorf("b was meant by %s, %v", r, err)
	}
	if _, err := s.RefOf(t.Context(), Digest("never")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what no tag meant: %v, want fs.ErrNotExist", err)
	}
}

func kept(t *testing.T, open func() Store) {
	s, ref, p := open(), Ref("1"), holding(t)
	for i := range 8 {
		mustMove(t, s, Ref("free"), fmt.Sprint(i%7), start.Add(time.Duration(i)*24*time.Hour)) // 0 again at the end
	}
	observe(t, s, ref, p, say("a"), start)
	observe(t, s, ref, p, say("b"), start.Add(200*24*time.Hour))
	list := func(digests int, since time.Time) map[digest.Digest]bool {
		t.Helper()
		out := make(map[digest.Digest]bool) // firmly?
		for k, err := range s.Keep(t.Context(), digests, since) {
			if err != nil {
				t.Fatal(err)
			}
			if out[k.Digest] && !k.Firm {
				continue
			}
			out[k.Digest] = k.Firm
		}
		return out
	}
	observe(t, s, Ref("gone"), p, say("g"), start) // deleted upstream: what is served is kept, too
	for i := range 4 {
		observe(t, s, Ref("gone"), p, audit.Observation{Absent: fs.ErrNotExist, Gone: i == 3}, start.Add(time.Duration(i+1)*time.Hour))
	}
	listing := audit.Event{ID: uuid.Must(uuid.NewV7()), Type: audit.Snapshot, Time: start.Add(time.Hour), Snapshot: &audit.Commitment{Digest: Digest("listing")}}
	if _, err := s.Append(t.Context(), listing); err != nil {
		t.Fatal(err)
	}
	forever, errs := audit.Compile(audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: audit.Immutable}}})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	observe(t, s, Ref("tomb"), forever, say("i"), start) // deleted, and promised for ever
	for i := range 4 {
		observe(t, s, Ref("tomb"), forever, audit.Observation{Absent: fs.ErrNotExist, Gone: i == 3}, start.Add(time.Duration(i+1)*time.Hour))
	}
	if tags, err := s.Tags(t.Context(), audit.TagQuery{Kept: true}); err != nil || len(tags) != 2 {
		t.Errorf("%d tags are kept, %v; want the held one and the one that is promised", len(tags), err)
	}
	got := list(3, start)
	want := map[digest.Digest]bool{Digest("a"): true, Digest("b"): false, Digest("g"): false, Digest("i"): true, Digest("listing"): false, Digest("0"): false, Digest("6"): false, Digest("5"): false}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the newest three: %v, want %v", got, want)
	}
	if got := list(5, start.Add(100*24*time.Hour)); len(got) != 4 || !got[Digest("a")] || !got[Digest("i")] {
		t.Errorf("of the last days: %v, want what is meant now, and what is held", got)
	}
	if got := list(0, start); len(got) != 2 || !got[Digest("a")] || !got[Digest("i")] {
		t.Errorf("no history: %v, want only what is promised", got)
	}
}

func memory(t *testing.T, open func() Store) {
	s := open()
	if v, err := s.Recall(t.Context(), "k"); err != nil || v != "" {
		t.Errorf("Recall before = %q, %v", v, err)
	}
	for _, v := range []string{"one", "two"} {
		if err := s.Remember(t.Context(), "k", v); err != nil {
			t.Fatal(err)
		}
	}
	if v, err := open().Recall(t.Context(), "k"); err != nil || v != "two" {
		t.Errorf("Recall = %q, %v", v, err)
	}
}

func exposures(t *testing.T, open func() Store) {
	s := open()
	e := audit.Exposure{Digest: Digest("a"), Client: "10.0.0.1", Ref: "x", First: start, Last: start.Add(time.Minute), Resolves: 1}
	later := e
	later.First, later.Last, later.Resolves, later.Fetches = start.Add(time.Hour), start.Add(2*time.Hour), 0, 2
	other := e
	other.Client = "10.0.0.2"
	for _, batch := range [][]audit.Exposure{{e}, {later, other}} {
		if err := s.AddExposures(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.Exposures(t.Context(), Digest("a"))
	if err != nil || len(got) != 2 || got[0].Resolves != 1 || got[0].Fetches != 2 || !got[0].First.Equal(start) || !got[0].Last.Equal(start.Add(2*time.Hour)) {
		t.Errorf("exposures are %+v, %v", got, err)
	}
	if err := s.ForgetExposures(t.Context(), start.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	left := 0
	for _, err := range s.EachExposure(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		left++
	}
	if left != 1 {
		t.Errorf("%d are left, want 1", left)
	}
}

func conditions(t *testing.T, open func() Store) {
	s := open()
	end := start.Add(time.Hour)
	for _, c := range []audit.Condition{
		{Upstream: "docker.io", Type: audit.Degraded, Since: start, Cause: "503"},
		{Upstream: "ghcr.io", Type: audit.Degraded, Since: start, Cause: "503"},
		{Upstream: "docker.io", Type: audit.Degraded, Since: start, Until: &end},
		{Upstream: "ghcr.io", Type: audit.AccessLost, Since: end, Cause: "401"}, // the process before did not see the end
	} {
		if err := s.PutCondition(t.Context(), c, audit.Event{}); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.Conditions(t.Context(), 10)
	if err != nil || len(got) != 3 || got[0].Until != nil || got[1].Until == nil || !got[2].Until.Equal(end) || got[2].Cause != "503" {
		t.Errorf("conditions are %+v, %v", got, err)
	}
}

func fork(t *testing.T, open func() Store) {
	s := open()
	mustMove(t, s, Ref("1"), "a", start)
	tree, err := s.Tree(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SaveCheckpoint(t.Context(), tree, []byte("old"), start); err != nil {
		t.Fatal(err)
	}
	e := audit.Event{ID: uuid.Must(uuid.NewV7()), Type: audit.Forked, Time: start, Fork: &audit.ForkedTrees{NewOrigin: "tidemark.test/new"}}
	if index, err := s.Fork(t.Context(), "tidemark.test/new", e); err != nil || index != 1 {
		t.Fatalf("Fork = %d, %v", index, err)
	}
	if origin, err := s.Origin(t.Context()); err != nil || origin != "tidemark.test/new" {
		t.Errorf("origin is %q, %v", origin, err)
	}
	if note, err := s.Checkpoint(t.Context()); err != nil || note != nil {
		t.Errorf("the new log's checkpoint is %q, %v; want none", note, err)
	}
	other := tlog.Tree{N: 1, Hash: tlog.RecordHash([]byte("another root"))}
	if err := s.SaveCheckpoint(t.Context(), other, []byte("new"), start); err != nil {
		t.Errorf("the old log's checkpoint is in the way: %v", err)
	}
	Check(t, s)
}
