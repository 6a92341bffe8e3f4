package audittest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"

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
	tell(t, s, a, "two", now.Add(time.Minute), now.Add(16*time.Minute), "ops", "log") // 1
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
	b := Ref("b")
	tell(t, s, b, "one", now, now)
	tell(t, s, b, "two", now.Add(time.Minute), now.Add(time.Minute), "late")      // 6
	tell(t, s, b, "one", now.Add(5*time.Minute), now.Add(20*time.Minute), "late") // 7
	wantDue(t, s, "what should have been told by then is told", "late", now.Add(time.Hour), 6, 7)
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

// decided records what an event of our own making does, about no ref.
func decided(t *testing.T, s Store, op audit.Operator, now time.Time) int64 {
	t.Helper()
	index, err := s.Append(context.Background(), audit.Event{ID: uuid.New(), Type: audit.Action, Time: now, Operator: &op})
	if err != nil {
		t.Fatal(err)
	}
	return index
}

// alerts: one is open from the event that opened it until one that ends it, whether
// somebody acknowledged it or not; a sink is reminded of it until then.
func alerts(t *testing.T, open func() Store) {
	ctx, s := context.Background(), open()
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	p, errs := audit.Compile(audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: audit.HoldMode}}})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	see := func(tag, name string) {
		t.Helper()
		if _, err := Advance(ctx, s, Ref(tag), p, audit.Observation{Digest: Digest(name), MediaType: "application/x", Size: 7}, now); err != nil {
			t.Fatal(err)
		}
		now = now.Add(time.Hour)
	}
	want := func(when string, all bool, want ...string) {
		t.Helper()
		list, err := s.Alerts(ctx, all, 100)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, a := range list {
			state := "open"
			if a.Acknowledged != nil {
				state = "acknowledged"
			}
			if a.Resolved != nil {
				state = "ended by " + string(a.ResolvedBy)
			}
			got = append(got, fmt.Sprintf("%d %s %s %s", a.Index, a.Ref.Tag, a.Type, state))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
	}
	see("a", "one") // 0
	see("b", "one") // 1
	see("a", "two") // 2 moved, 3 held
	see("b", "two") // 4, 5
	want("held", false, "5 b tag.held open", "3 a tag.held open")
	letters, err := s.Unheeded(ctx, "ops", now)
	if err != nil || len(letters) != 2 || letters[0].Index != 3 || letters[0].Ref != Ref("a") {
		t.Fatalf("unheeded: %+v, %v", letters, err)
	}
	if letters, err = s.Unheeded(ctx, "ops", now.Add(-2*time.Hour)); err != nil || len(letters) != 1 {
		t.Errorf("unheeded for two hours: %+v, %v", letters, err)
	}
	if err := s.Remind(ctx, "ops", []int64{3}, now); err != nil {
		t.Fatal(err)
	}
	if letters, err = s.Due(ctx, "ops", now, 10); err != nil || len(letters) != 1 || letters[0].Index != 3 || letters[0].Reminder != 1 {
		t.Errorf("reminded of %+v, %v", letters, err)
	}
	if err := errors.Join(s.Seal(ctx, "ops", "r", []int64{3}), s.Settle(ctx, audit.Delivery{Sink: "ops", Batch: "r", Dead: true, Error: "never"}), s.Remind(ctx, "ops", []int64{3}, now)); err != nil {
		t.Fatal(err)
	}
	if letters, err = s.Due(ctx, "ops", now, 10); err != nil || len(letters) != 1 || letters[0].Reminder != 2 || letters[0].Batch != "" {
		t.Errorf("reminded after a dead letter: %+v, %v", letters, err)
	}
	if letters, err = s.Unheeded(ctx, "ops", now.Add(time.Hour)); err != nil || len(letters) != 1 || letters[0].Index != 5 {
		t.Errorf("unheeded, and not to be told of: %+v, %v", letters, err)
	}
	entry := int64(5)
	decided(t, s, audit.Operator{Action: audit.Acknowledge, Entry: &entry}, now)
	s.Close()
	s = open()
	if counts, err := s.AlertCounts(ctx); err != nil || len(counts) != 1 || counts[audit.Held] != 2 {
		t.Errorf("counts: %v, %v", counts, err)
	}
	want("acknowledged", false, "5 b tag.held acknowledged", "3 a tag.held open")
	see("a", "three") // 7 moved, 8 withdrawn, 9 held: another digest is another question
	want("it moved again", false, "9 a tag.held open", "5 b tag.held acknowledged")
	see("b", "one") // it went back
	want("it went back", false, "9 a tag.held open")
	want("all of them", true, "9 a tag.held open", "5 b tag.held ended by tag.reverted", "3 a tag.held ended by tag.moved")
	if letters, err = s.Unheeded(ctx, "ops", now); err != nil || len(letters) != 1 || letters[0].Index != 9 {
		t.Errorf("unheeded after all: %+v, %v", letters, err)
	}

	until := now.Add(time.Hour)
	decided(t, s, audit.Operator{Action: audit.MuteAction, Target: "docker.io/**", Reason: "moving house", Until: &until}, now)
	later := now.Add(9 * time.Hour)
	decided(t, s, audit.Operator{Action: audit.MuteAction, Target: "docker.io/**", Reason: "longer", Until: &later}, now)
	decided(t, s, audit.Operator{Action: audit.MuteAction, Target: "ghcr.io/**", Reason: "x", Until: &until}, now)
	mutes, err := s.Mutes(ctx, now)
	if err != nil || len(mutes) != 2 || mutes[0].Match.String() != "docker.io/**" || mutes[0].Reason != "longer" || !mutes[0].Until.Equal(later) {
		t.Errorf("mutes: %+v, %v", mutes, err)
	}
	decided(t, s, audit.Operator{Action: audit.Unmute, Target: "docker.io/**"}, now)
	if mutes, err = s.Mutes(ctx, now); err != nil || len(mutes) != 1 {
		t.Errorf("taken back: %+v, %v", mutes, err)
	}
	if mutes, err = s.Mutes(ctx, until); err != nil || len(mutes) != 0 {
		t.Errorf("over: %+v, %v", mutes, err)
	}
}

// notices: that a condition began and ended is told like an event; who was not told yet
// that it began is told of neither.
func notices(t *testing.T, open func() Store) {
	ctx, s := context.Background(), open()
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	began := audit.Event{
		ID: uuid.New(), Type: audit.Degraded, Time: now, Condition: &audit.Condition{Upstream: "docker.io", Type: audit.Degraded, Since: now},
		Recipients: []audit.Recipient{{Sink: "ops", At: now.Add(15 * time.Minute)}, {Sink: "log", At: now}},
	}
	put := func(c audit.Condition, e audit.Event) {
		t.Helper()
		if err := s.PutCondition(ctx, c, e); err != nil {
			t.Fatal(err)
		}
	}
	put(*began.Condition, began)
	put(*began.Condition, began) // the first time was not known to have succeeded
	letters, err := s.Due(ctx, "ops", now.Add(time.Hour), 10)
	if err != nil || len(letters) != 1 || letters[0].Index >= 0 {
		t.Fatalf("that it began: %+v, %v", letters, err)
	}
	if e, err := audit.ParseLeaf(letters[0].Leaf); err != nil || e.ID != began.ID || e.Condition.Upstream != "docker.io" {
		t.Errorf("told %s, %v", letters[0].Leaf, err)
	}
	if err := errors.Join(s.Seal(ctx, "log", "m", []int64{letters[0].Index}), s.Settle(ctx, audit.Delivery{Sink: "log", Batch: "m", Sent: true})); err != nil {
		t.Fatal(err)
	}
	until := now.Add(time.Minute)
	ended := began
	ended.ID, ended.Type, ended.Time, ended.Flapped = uuid.New(), audit.Recovered, until, began.ID
	put(audit.Condition{Upstream: "docker.io", Type: audit.Degraded, Since: now, Until: &until}, ended)
	put(audit.Condition{Upstream: "docker.io", Type: audit.Degraded, Since: now, Until: &until}, ended)
	if got := due(t, s, "ops", until.Add(time.Hour)); len(got) != 0 {
		t.Errorf("nobody was told that it began, and is to be told of %v", got)
	}
	if got := due(t, s, "log", until.Add(time.Hour)); len(got) != 1 {
		t.Errorf("who was told that it began is to be told of %v", got)
	}
	if n := len(Check(t, s)); n != 0 {
		t.Errorf("the log has %d entries", n)
	}
}

// former: what a ref meant before it meant what is not to be served any more.
func former(t *testing.T, open func() Store) {
	ctx, s := context.Background(), open()
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	for i, name := range []string{"one", "two", "three"} {
		mustMove(t, s, Ref("a"), name, now.Add(time.Duration(i)*time.Hour))
	}
	mustMove(t, s, Ref("b"), "four", now)
	var got []digest.Digest
	_, err := s.Advance(ctx, Ref("a"), func(r audit.Record) (audit.State, []audit.Event, error) {
		for _, skipped := range [][]digest.Digest{nil, {Digest("three")}, {Digest("three"), Digest("two"), Digest("one")}} {
			c, ok := r.Former(func(d digest.Digest) bool { return slices.Contains(skipped, d) })
			if ok != (c.Digest != "") {
				t.Errorf("%+v, %t", c, ok)
			}
			got = append(got, c.Digest)
		}
		if r.Burst(now, now.Add(24*time.Hour)) {
			t.Error("a burst was told of, and there was none")
		}
		return r.State, nil, nil
	})
	if want := []digest.Digest{Digest("three"), Digest("two"), ""}; err != nil || !slices.Equal(got, want) {
		t.Errorf("former: %v, %v; want %v", got, err, want)
	}
}
