package audittest

import (
	"context"
	"slices"
	"testing"
	"time"

	"tidemark/audit"
)

// tell records a move of ref to name, of which sinks are to be told at a time.
func tell(t *testing.T, s Store, ref audit.Ref, name string, now, at time.Time, sinks ...string) audit.State {
	t.Helper()
	st, err := s.Advance(context.Background(), ref, func(r audit.Record) (audit.State, []audit.Event, error) {
		var p *audit.Policy
		st, events := p.Next(ref, r, audit.Observation{Digest: Digest(name), MediaType: "application/x", Size: 7}, now)
		audit.Identify(&st, events)
		for i := range events {
			for _, sink := range sinks {
				events[i].Recipients = append(events[i].Recipients, audit.Recipient{Sink: sink, At: at})
			}
		}
		return st, events, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func due(t *testing.T, s Store, sink string, now time.Time) (indexes []int64) {
	t.Helper()
	letters, err := s.Due(context.Background(), sink, now, 100)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range letters {
		indexes = append(indexes, l.Index)
	}
	return indexes
}

func wantDue(t *testing.T, s Store, when, sink string, now time.Time, want ...int64) {
	t.Helper()
	if got := due(t, s, sink, now); !slices.Equal(got, want) {
		t.Errorf("%s: %s is to be told of %v, want %v", when, sink, got, want)
	}
}

// outbox: letters are committed with their event, become messages that stay what they
// are, and are done with when they are acknowledged; each of it survives.
func outbox(t *testing.T, open func() Store) {
	ctx, s := context.Background(), open()
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	a, b := Ref("a"), Ref("b")
	tell(t, s, a, "one", now, now)
	tell(t, s, b, "one", now, now)
	tell(t, s, a, "two", now, now, "ops", "log")                            // 2
	tell(t, s, b, "two", now, now, "ops")                                   // 3
	tell(t, s, a, "three", now.Add(time.Hour), now.Add(2*time.Hour), "ops") // 4
	wantDue(t, s, "at first", "ops", now, 2, 3)
	wantDue(t, s, "at first", "log", now, 2)
	if next, err := s.NextDue(ctx, "ops"); err != nil || !next.Equal(now) {
		t.Errorf("the next is due at %v, %v", next, err)
	}

	settle := func(d audit.Delivery) {
		t.Helper()
		if err := s.Settle(ctx, d); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Seal(ctx, "ops", "m", []int64{2}); err != nil {
		t.Fatal(err)
	}
	settle(audit.Delivery{Sink: "ops", Batch: "m", Again: now.Add(3 * time.Hour), Error: "no"})
	wantDue(t, s, "after a failure", "ops", now, 3)
	wantDue(t, s, "what follows waits for what was tried", "ops", now.Add(2*time.Hour), 3)
	wantDue(t, s, "other sinks do not", "log", now, 2)
	s.Close()
	s = open()
	letters, err := s.Due(ctx, "ops", now.Add(3*time.Hour), 100)
	if err != nil || len(letters) != 2 || letters[0].Index != 2 || letters[0].Batch != "m" || letters[0].Attempts != 1 || letters[1].Index != 3 {
		t.Errorf("after a restart: %+v, %v", letters, err)
	}
	settle(audit.Delivery{Sink: "ops", Batch: "m", Sent: true})
	wantDue(t, s, "after it was taken", "ops", now.Add(3*time.Hour), 3, 4)
	if err := s.Seal(ctx, "ops", "n", []int64{3}); err != nil {
		t.Fatal(err)
	}
	settle(audit.Delivery{Sink: "ops", Batch: "n", Dead: true, Error: "never"})
	wantDue(t, s, "after it was given up", "ops", now.Add(3*time.Hour), 4)
	counts, err := s.OutboxCounts(ctx)
	want := []audit.OutboxCount{{Sink: "log", State: "pending", N: 1}, {Sink: "ops", State: "dead", N: 1}, {Sink: "ops", State: "pending", N: 1}}
	if err != nil || !slices.Equal(counts, want) {
		t.Errorf("counts %v, %v", counts, err)
	}
	if err := s.Requeue(ctx, "ops", []int64{2, 3}, now); err != nil {
		t.Fatal(err)
	}
	wantDue(t, s, "when told again", "ops", now, 2, 3)
}

// flaps: a move that is taken back within the window before anybody was told of it is
// told to nobody; who was told of it is told that it was taken back.
func flaps(t *testing.T, open func() Store) {
	ctx, s := context.Background(), open()
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	a := Ref("a")
	tell(t, s, a, "one", now, now)
	tell(t, s, a, "two", now.Add(time.Minute), now, "ops", "log") // 1
	if err := s.Seal(ctx, "log", "m", []int64{1}); err != nil {
		t.Fatal(err)
	}
	if err := s.Settle(ctx, audit.Delivery{Sink: "log", Batch: "m", Sent: true}); err != nil {
		t.Fatal(err)
	}
	tell(t, s, a, "one", now.Add(10*time.Minute), now, "ops", "log") // 2
	wantDue(t, s, "there and back", "ops", now.Add(time.Hour))
	wantDue(t, s, "there and back", "log", now.Add(time.Hour), 2)
	tell(t, s, a, "two", now.Add(2*time.Hour), now, "ops") // 3
	tell(t, s, a, "one", now.Add(4*time.Hour), now, "ops") // 4
	wantDue(t, s, "hours apart", "ops", now.Add(4*time.Hour), 3, 4)
}

// cadence: what the watcher asks a store.
func cadence(t *testing.T, open func() Store) {
	ctx, s := context.Background(), open()
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	for i, name := range []string{"one", "two", "three"} {
		if _, err := Move(ctx, s, Ref("a"), name, now.Add(time.Duration(i)*time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	if n, since, err := s.Moves(ctx, Ref("a")); n != 2 || !since.Equal(now) || err != nil {
		t.Errorf("moves: %d since %v, %v", n, since, err)
	}
	if n, since, err := s.Moves(ctx, Ref("never")); n != 0 || !since.IsZero() || err != nil {
		t.Errorf("moves of what is not known: %d since %v, %v", n, since, err)
	}
	known, err := s.Known(ctx)
	if want := (audit.Ref{Upstream: "docker.io", Repository: "library/app"}); err != nil || len(known) != 1 || known[0] != want {
		t.Errorf("known: %v, %v", known, err)
	}
	err = s.AddExposures(ctx, []audit.Exposure{
		{Digest: Digest("one"), Client: "10.0.0.1", Ref: Ref("a").String(), First: now, Last: now, Resolves: 1},
		{Digest: Digest("two"), Client: "10.0.0.1", Ref: Ref("a").String(), First: now, Last: now.Add(time.Hour), Resolves: 1},
		{Digest: Digest("two"), Client: "10.0.0.2", Ref: Ref("a").String(), First: now, Last: now, Resolves: 3},
		{Digest: Digest("two"), Client: "10.0.0.3", Ref: "docker.io/library/app", First: now, Last: now, Fetches: 3},
		{Digest: Digest("old"), Client: "10.0.0.3", Ref: Ref("b").String(), First: now, Last: now.Add(-time.Hour), Resolves: 3},
	})
	if err != nil {
		t.Fatal(err)
	}
	pulled, err := s.Pulled(ctx, now)
	if err != nil || len(pulled) != 1 || pulled[0] != (audit.Pulled{Ref: Ref("a"), Clients: 2}) {
		t.Errorf("pulled: %v, %v", pulled, err)
	}
}
