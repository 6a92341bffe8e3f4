package watch_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"tidemark/audit"
	"tidemark/proxy/watch"
)

var pace = watch.Pace{Base: 15 * time.Minute, Floor: time.Minute, Ceiling: 24 * time.Hour}

// Each tag is asked about at the pace at which it moves: one that never does in a
// year nearly once a day, one that moves every hour every minute, and one of which
// nothing is known as the configuration says.
func TestTagsAreAskedAboutAtTheirOwnPace(t *testing.T) {
	const day = 24 * time.Hour
	for name, c := range map[string]struct {
		watch.Cadence
		want time.Duration
	}{
		"never seen":                     {watch.Cadence{Clients: 1}, 15 * time.Minute},
		"never moved in a year":          {watch.Cadence{Watched: 365 * day, Clients: 1}, 24 * time.Hour},
		"moves every hour":               {watch.Cadence{Watched: 30 * day, Moves: 720, Clients: 1}, time.Minute},
		"an official tag, twice a month": {watch.Cadence{Watched: 180 * day, Moves: 12, Clients: 1}, 101 * time.Minute},
		"the same, pulled by sixteen":    {watch.Cadence{Watched: 180 * day, Moves: 12, Clients: 16}, 33 * time.Minute},
	} {
		if got := pace.Interval(c.Cadence); got < c.want-time.Minute || got > c.want+time.Minute {
			t.Errorf("%s: every %v, want %v", name, got, c.want)
		}
	}
}

// world is a ledger and its upstream as a watcher sees them.
type world struct {
	mu     sync.Mutex
	pulled []audit.Pulled
	known  []audit.Ref
	tags   map[string][]string
	moved  map[audit.Ref]time.Time
	rate   watch.Rate
	fail   error
	asked  []question
	lists  int
}

type question struct {
	ref audit.Ref
	at  time.Time
}

func (w *world) Pulled(context.Context, time.Time) ([]audit.Pulled, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pulled, nil
}

func (w *world) Known(context.Context) ([]audit.Ref, error) { return w.known, nil }
func (w *world) Moves(_ context.Context, ref audit.Ref) (int, time.Time, error) {
	return 0, time.Time{}, nil
}

func (w *world) ask(_ context.Context, ref audit.Ref, _ time.Duration) (audit.Answer, error) {
	time.Sleep(50 * time.Millisecond) // on the way
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked = append(w.asked, question{ref, time.Now()})
	if w.fail != nil {
		return audit.Answer{Stale: w.fail}, nil
	}
	a := audit.Answer{}
	a.Head, a.HeadSince = "sha256:x", time.Unix(1, 0)
	if at, ok := w.moved[ref]; ok && !time.Now().Before(at) {
		a.HeadSince, a.Move = at, &audit.Move{At: at, Settled: true} // what stands beside it was not looked at
	}
	return a, nil
}

func (w *world) list(_ context.Context, upstream, repository string) ([]string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lists++
	return w.tags[upstream+"/"+repository], nil
}

func (w *world) questions() []question {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.asked)
}

// watching runs a watcher over the world for a time.
func (w *world) watching(t *testing.T, d time.Duration, patterns ...string) {
	t.Helper()
	o := watch.Options{
		Seen: time.Hour, Pace: pace, Source: w, Ask: w.ask, List: w.list, Log: zerolog.Nop(),
		Rate: func(string) watch.Rate { w.mu.Lock(); defer w.mu.Unlock(); return w.rate },
	}
	for _, p := range patterns {
		g, err := audit.ParseGlob(p)
		if err != nil {
			t.Fatal(err)
		}
		o.Patterns = append(o.Patterns, g)
	}
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	if err := watch.New(o).Run(ctx); err != nil {
		t.Error(err)
	}
}

func refs(n int) (out []audit.Pulled) {
	for i := range n {
		out = append(out, audit.Pulled{Ref: audit.Ref{Upstream: "docker.io", Repository: fmt.Sprintf("library/app%d", i/10), Tag: fmt.Sprint(i % 10)}, Clients: 1})
	}
	return out
}

// Ten thousand tags are never more than two hundred questions a minute, from the
// first minute on, and nobody is forgotten.
func TestManyTagsAreNoRush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{pulled: refs(10_000)}
		w.watching(t, 80*time.Minute)
		minutes := make(map[time.Time]int)
		seen := make(map[audit.Ref]bool)
		for _, q := range w.questions() {
			minutes[q.at.Truncate(time.Minute)]++
			seen[q.ref] = true
		}
		for at, n := range minutes {
			if n > 201 {
				t.Errorf("%d questions in the minute of %v", n, at)
			}
		}
		if len(seen) != 10_000 {
			t.Errorf("%d tags were asked about, want all", len(seen))
		}
	})
}

// A start is no stampede: the tags of a process before are spread over their interval.
func TestStartIsNoStampede(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{pulled: refs(500)}
		w.watching(t, time.Minute)
		if n := len(w.questions()); n < 5 || n > 100 {
			t.Errorf("%d of 500 tags were asked about in the first of fifteen minutes", n)
		}
	})
}

// What is left of a rate limit below three tenths is for clients: one question
// now and then finds out whether there is more again.
func TestClientsKeepTheirShareOfTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{pulled: refs(500), rate: watch.Rate{Limit: 100, Remaining: 30}}
		w.watching(t, time.Hour)
		if n := len(w.questions()); n < 8 || n > 13 {
			t.Errorf("%d questions in an hour without a budget, want one in five minutes", n)
		}
		w.rate, w.asked = watch.Rate{Limit: 100, Remaining: 31}, nil
		w.watching(t, time.Hour)
		if n := len(w.questions()); n < 1000 {
			t.Errorf("%d questions in an hour with one", n)
		}
	})
}

// trouble is what an upstream in trouble says.
type trouble struct {
	status int
	wait   time.Duration
}

func (e trouble) Error() string       { return http.StatusText(e.status) }
func (e trouble) Wait() time.Duration { return e.wait }
func (e trouble) Condition() string {
	if e.status == 403 {
		return audit.AccessLost
	}
	return audit.Degraded
}

// An upstream in trouble is left alone, longer each time, and for as long as it
// asks for; one that hides a repository is asked about others.
func TestTroubleIsLeftAlone(t *testing.T) {
	for name, c := range map[string]struct {
		err       error
		low, high int // questions in an hour
	}{
		"no answer":             {trouble{status: 503}, 6, 9 + 8},
		"asks for half an hour": {trouble{status: 429, wait: 30 * time.Minute}, 1, 3 + 8},
		"hides one":             {trouble{status: 403}, 1000, 3000},
		"is ours":               {errors.New("the disk is full"), 1000, 3000},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{pulled: refs(500), fail: c.err}
				w.watching(t, time.Hour)
				if n := len(w.questions()); n < c.low || n > c.high {
					t.Errorf("%d questions in an hour, want %d to %d", n, c.low, c.high)
				}
			})
		})
	}
}

// When one tag moves, the others of its repository are asked about at once, and it
// is confirmed by a second answer within a minute.
func TestMoveHurriesItsSiblings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{pulled: refs(10)}
		moves := time.Now().Add(40 * time.Minute)
		first := w.pulled[3].Ref
		w.moved = map[audit.Ref]time.Time{first: moves}
		w.watching(t, 70*time.Minute)
		var told time.Time
		after := make(map[audit.Ref]int)
		for _, q := range w.questions() {
			switch {
			case told.IsZero() && q.ref == first && !q.at.Before(moves):
				told = q.at
			case !told.IsZero() && q.at.Sub(told) <= time.Minute:
				after[q.ref]++
			}
		}
		if told.IsZero() || len(after) != 10 {
			t.Errorf("moved at %v, seen at %v; within a minute %d of 10 were asked about: %v", moves, told, len(after), after)
		}
	})
}

// A tag that moved is asked about when what stands beside it is to be looked at, ten
// minutes later; one of which that cannot be seen is asked about no more than others.
func TestAMoveThatCannotBeLookedAtIsNoRush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{pulled: refs(1)}
		ref, moves := w.pulled[0].Ref, time.Now().Add(40*time.Minute)
		w.moved = map[audit.Ref]time.Time{ref: moves}
		w.watching(t, 24*time.Hour)
		after := 0
		for _, q := range w.questions() {
			if q.at.After(moves) {
				after++
			}
		}
		if after < 80 || after > 24*4+5 { // every fifteen minutes, the confirmation, and one for that
			t.Errorf("asked about %d times in a day after it moved", after)
		}
	})
}

// Patterns stand for tags of upstream's list and for repositories known here; lists
// are asked for every few hours.
func TestPatternsAreResolved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{
			known: []audit.Ref{{Upstream: "quay.io", Repository: "prometheus/node"}, {Upstream: "quay.io", Repository: "prometheus/alert"}, {Upstream: "quay.io", Repository: "other/x"}},
			tags:  map[string][]string{"docker.io/library/nginx": {"1.27", "1.27.1", "1.26", "latest"}, "localhost:5000/a": {"x"}},
		}
		w.watching(t, 3*time.Hour, "docker.io/library/nginx:1.27*", "quay.io/prometheus/*:latest", "docker.io/library/redis:8", "localhost:5000/a:*")
		seen := make(map[string]bool)
		for _, q := range w.questions() {
			seen[q.ref.String()] = true
		}
		for _, want := range []string{"docker.io/library/nginx:1.27", "docker.io/library/nginx:1.27.1", "quay.io/prometheus/node:latest", "quay.io/prometheus/alert:latest", "docker.io/library/redis:8", "localhost:5000/a:x"} {
			if !seen[want] {
				t.Errorf("%s is not watched", want)
			}
			delete(seen, want)
		}
		if len(seen) > 0 || w.lists != 2 {
			t.Errorf("watched besides: %v; %d lists", seen, w.lists)
		}
	})
}

// Who is pulled no longer is watched no longer.
func TestForgottenTagsAreLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{pulled: refs(20)}
		go func() {
			time.Sleep(time.Hour)
			w.mu.Lock()
			defer w.mu.Unlock()
			w.pulled = nil
		}()
		began := time.Now()
		w.watching(t, 3*time.Hour)
		for _, q := range w.questions() {
			if q.at.Sub(began) > 71*time.Minute {
				t.Fatalf("%s was asked about at %v", q.ref, q.at.Sub(began))
			}
		}
	})
}
