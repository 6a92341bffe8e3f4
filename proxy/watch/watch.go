// Package watch asks upstreams about tags that nobody pulls at the moment, on a
// schedule that each tag makes for itself, and so that neither upstream nor the
// clients who share its limits notice.
package watch

import (
	"container/heap"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"tidemark/audit"
)

// Options configure a Watcher. Source, Ask, and List are required.
type Options struct {
	Patterns []audit.Glob  // tags that are asked about whoever pulls them
	Seen     time.Duration // and those that a client pulled within this time; 0 for none
	Pace     Pace

	Source Source

	// Ask has the ledger ask upstream about a ref, unless somebody just did. What
	// upstream could not say is in the answer, as why it is stale. every is how often the
	// ref is asked about at present.
	Ask func(ctx context.Context, ref audit.Ref, every time.Duration) (audit.Answer, error)

	// List returns the tags of a repository, as upstream has them.
	List func(ctx context.Context, upstream, repository string) ([]string, error)

	// Rate is what an upstream said of its rate limit, as of its last answer. Nil
	// knows of none.
	Rate func(upstream string) Rate

	// PerMinute bounds the questions to one upstream. Default 200 (AUDIT.md, R12).
	PerMinute int

	Log zerolog.Logger
}

// A Source is what is known of tags: the ledger's store.
type Source interface {
	// Pulled returns the refs that clients pulled since a time.
	Pulled(ctx context.Context, since time.Time) ([]audit.Pulled, error)

	// Known returns the repositories of which a tag is known.
	Known(ctx context.Context) ([]audit.Ref, error)

	// Moves tells how often a ref moved, and since when it is known; zero if it is not.
	Moves(ctx context.Context, ref audit.Ref) (moves int, since time.Time, err error)
}

// A Watcher asks about tags. Create it with New and call Run, once.
type Watcher struct {
	o   Options
	log zerolog.Logger

	mu        sync.Mutex
	upstreams map[string]*queue
}

// A queue is what one upstream is to be asked, the next first.
type queue struct {
	wake  chan struct{} // holds one: something became due earlier
	items schedule
	byRef map[audit.Ref]*item

	paused time.Time     // nobody is asked before
	pause  time.Duration // of the last pause, doubled by the next
}

// An item is one ref and when to ask about it.
type item struct {
	ref     audit.Ref
	due     time.Time
	clients int
	head    time.Time // since when the head is what it is, as of the last answer
	cadence cadence   // as of that head
	place   int       // in the schedule, -1 while it is asked about
	round   int       // the last refresh that wanted it
}

const (
	refreshEvery = 10 * time.Minute // who pulled what is looked up
	listEvery    = 6 * time.Hour    // tags of repositories are listed
	refsMost     = 100_000          // that are watched; some 300 bytes each
	again        = 45 * time.Second // a move is confirmed by a second answer (AUDIT.md, R3)
	pauseFirst   = time.Minute      // after an answer that is trouble
	pauseMost    = 15 * time.Minute
	spentPause   = 5 * time.Minute // when what is left of a limit is for clients
	parallel     = 8               // questions to one upstream that are under way
)

// New returns a watcher. It starts nothing.
func New(o Options) *Watcher {
	if o.PerMinute == 0 {
		o.PerMinute = 200
	}
	if o.Rate == nil {
		o.Rate = func(string) Rate { return Rate{} }
	}
	return &Watcher{o: o, log: o.Log, upstreams: make(map[string]*queue)}
}

// Run asks until ctx ends.
func (w *Watcher) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	lists := make(map[string]listed)
	for round := 1; ; round++ {
		if err := w.refresh(ctx, round, lists, func(name string, q *queue) {
			wg.Go(func() { w.serve(ctx, name, q) })
		}); err != nil && ctx.Err() == nil {
			w.log.Warn().Err(err).Msg("what to watch could not be found out; what was watched before is")
		}
		select {
		case <-time.After(refreshEvery):
		case <-ctx.Done():
			return nil
		}
	}
}

// Lag is by how much the most overdue question is late.
func (w *Watcher) Lag() (late time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	for _, q := range w.upstreams {
		if len(q.items) > 0 {
			late = max(late, now.Sub(q.items[0].due))
		}
	}
	return late
}

// refresh brings what is watched up to date. start is called for an upstream that
// had nothing to watch before.
func (w *Watcher) refresh(ctx context.Context, round int, lists map[string]listed, start func(string, *queue)) error {
	wanted, err := w.wanted(ctx, lists)
	if err != nil {
		return err
	}
	fresh := make(map[audit.Ref]int)
	w.mu.Lock()
	for ref, clients := range wanted {
		q := w.upstreams[ref.Upstream]
		if q == nil {
			q = &queue{wake: make(chan struct{}, 1), byRef: make(map[audit.Ref]*item)}
			w.upstreams[ref.Upstream] = q
			start(ref.Upstream, q)
		}
		if it := q.byRef[ref]; it != nil {
			it.clients, it.round = clients, round
			continue
		}
		fresh[ref] = clients
	}
	for _, q := range w.upstreams {
		for ref, it := range q.byRef {
			if it.round != round {
				delete(q.byRef, ref)
				if it.place >= 0 {
					heap.Remove(&q.items, it.place)
				}
			}
		}
	}
	w.mu.Unlock()
	for ref, clients := range fresh {
		if err := w.add(ctx, ref, clients, round); err != nil {
			return err
		}
	}
	return nil
}

// add begins to watch a ref: somewhere within its first interval, so that a start
// with many of them is no rush.
func (w *Watcher) add(ctx context.Context, ref audit.Ref, clients, round int) error {
	c, err := w.cadence(ctx, ref)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	q := w.upstreams[ref.Upstream]
	it := &item{ref: ref, clients: clients, round: round, cadence: c, due: time.Now().Add(rand.N(w.interval(c, clients)))}
	q.byRef[ref] = it
	q.put(it)
	return nil
}

// A cadence is how often a ref moved, and since when it is known.
type cadence struct {
	moves int
	since time.Time
}

func (w *Watcher) cadence(ctx context.Context, ref audit.Ref) (c cadence, err error) {
	c.moves, c.since, err = w.o.Source.Moves(ctx, ref)
	return c, err
}

func (w *Watcher) interval(c cadence, clients int) time.Duration {
	known := Cadence{Moves: c.moves, Clients: clients}
	if !c.since.IsZero() {
		known.Watched = max(0, time.Since(c.since))
	}
	return w.o.Pace.Interval(known)
}

// put enters an item into the schedule and wakes who waits for it. w.mu is held.
func (q *queue) put(it *item) {
	heap.Push(&q.items, it)
	if it.place == 0 {
		select {
		case q.wake <- struct{}{}:
		default:
		}
	}
}

// serve asks one upstream, one question after the other and never more than it
// should get in a minute, until ctx ends.
func (w *Watcher) serve(ctx context.Context, name string, q *queue) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, parallel)
	gap := time.Minute / time.Duration(w.o.PerMinute)
	for {
		it, wait := w.next(name, q)
		if it == nil {
			select {
			case <-time.After(wait):
			case <-q.wake:
			case <-ctx.Done():
				return
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		wg.Go(func() {
			defer func() { <-slots }()
			w.ask(ctx, name, q, it)
		})
		select {
		case <-time.After(gap):
		case <-ctx.Done():
			return
		}
	}
}

// next takes what is due out of the schedule, or says how long there is nothing.
func (w *Watcher) next(name string, q *queue) (*item, time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if now.Before(q.paused) {
		return nil, q.paused.Sub(now)
	}
	if len(q.items) == 0 {
		return nil, refreshEvery
	}
	if wait := q.items[0].due.Sub(now); wait > 0 {
		return nil, wait
	}
	if w.o.Rate(name).spent() {
		q.paused = now.Add(spentPause) // this one finds out whether there is more again
	}
	return heap.Pop(&q.items).(*item), 0
}

// ask asks about one ref and schedules it again.
func (w *Watcher) ask(ctx context.Context, name string, q *queue, it *item) {
	w.mu.Lock()
	every := w.interval(it.cadence, it.clients)
	w.mu.Unlock()
	ans, err := w.o.Ask(ctx, it.ref, every)
	if ctx.Err() != nil {
		return
	}
	w.mu.Lock()
	known, same := it.cadence, ans.HeadSince.Equal(it.head)
	w.mu.Unlock()
	if !same {
		var cerr error
		if known, cerr = w.cadence(ctx, it.ref); cerr != nil {
			w.log.Warn().Err(cerr).Str("ref", it.ref.String()).Msg("how often a tag moves could not be read; it is asked about as one never seen")
		}
	}
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	trouble := err
	if trouble == nil {
		trouble = ans.Stale
	}
	q.answered(now, trouble)
	it.cadence = known
	interval := w.interval(known, it.clients)
	moved := !ans.HeadSince.Equal(it.head)
	if it.head.IsZero() { // the first answer since the start
		moved = !ans.Settled()
	}
	if ans.Known() {
		it.head = ans.HeadSince
	}
	switch {
	case moved:
		w.log.Debug().Str("ref", it.ref.String()).Msg("a watched tag moved; others of its repository are asked about")
		q.hurry(it.ref, now)
		interval = again
	case ans.Known() && !ans.Settled():
		interval = min(interval, again)
	}
	if due := ans.TrustDue(); due.After(now) { // one that is past could not be looked at: the next question will do
		interval = min(interval, max(again, due.Sub(now)))
	}
	if ans.Flap != nil && !ans.Flap.Since.IsZero() {
		interval *= 4 // R4
	}
	if q.byRef[it.ref] != it {
		return // not watched any more
	}
	it.due = now.Add(interval + rand.N(interval/10+1))
	q.put(it)
}

// hurry has the siblings of a ref that moved asked about now: what overwrites one
// tag often overwrites several. w.mu is held.
func (q *queue) hurry(ref audit.Ref, now time.Time) {
	for other, it := range q.byRef {
		if other.Repository == ref.Repository && other != ref && it.place >= 0 && it.due.After(now) {
			it.due = now
			heap.Fix(&q.items, it.place)
		}
	}
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// answered takes from an answer whether upstream is to be left alone for a while.
// w.mu is held.
func (q *queue) answered(now time.Time, err error) {
	var t audit.Trouble
	if !errors.As(err, &t) || t.Condition() == "" {
		q.pause = 0
		return
	}
	if t.Condition() == audit.AccessLost {
		return // it is about this one repository, more often than not
	}
	if now.Before(q.paused) {
		return // one trouble, told by several answers
	}
	q.pause = min(pauseMost, max(pauseFirst, 2*q.pause))
	wait := q.pause + rand.N(q.pause/4)
	var asked interface{ Wait() time.Duration }
	if errors.As(err, &asked) {
		wait = max(wait, asked.Wait())
	}
	q.paused = now.Add(wait)
}

// A schedule is a heap of items by when they are due.
type schedule []*item

func (s schedule) Len() int           { return len(s) }
func (s schedule) Less(i, j int) bool { return s[i].due.Before(s[j].due) }
func (s schedule) Swap(i, j int) {
	s[i], s[j] = s[j], s[i]
	s[i].place, s[j].place = i, j
}

func (s *schedule) Push(x any) {
	it := x.(*item)
	it.place = len(*s)
	*s = append(*s, it)
}

func (s *schedule) Pop() any {
	old := *s
	it := old[len(old)-1]
	old[len(old)-1] = nil
	*s = old[:len(old)-1]
	it.place = -1
	return it
}
