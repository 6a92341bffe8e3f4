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
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/taglog"
)

// A Store is what is tested: both sides of a ledger's store, and its leaves.
type Store interface {
	audit.Store
	audit.Log
	Leaves(ctx context.Context, start, n int64) ([][]byte, error)
	Events(ctx context.Context, q audit.EventQuery) ([]audit.Entry, error)
	Tags(ctx context.Context, q audit.TagQuery) ([]audit.Tag, error)
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
		mustMove(t, s, Ref(tag), tag, start.Add(time.Duration(i)*time.Hour))
	}
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
		{"all, sorted", audit.TagQuery{}, "[a b c]"},
		{"pattern", audit.TagQuery{Match: glob("docker.io/*/app:?")}, "[a b c]"},
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
