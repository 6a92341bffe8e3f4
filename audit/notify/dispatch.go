package notify

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"tidemark/audit"
)

// Options configure a Dispatcher. Outbox, Routes and Origin are required.
type Options struct {
	Outbox audit.Outbox
	Routes []Route
	Origin string // of the log

	// Undelivered, if set, records that a sink never took a message.
	Undelivered func(ctx context.Context, u audit.Undelivered) error

	// Clients, if set, tells how many clients had a digest.
	Clients func(ctx context.Context, d digest.Digest) (int, error)

	Log zerolog.Logger
}

// A Dispatcher brings letters to their sinks. Each sink has a worker of its own: one
// that hangs is in nobody's way.
type Dispatcher struct {
	o     Options
	grown []chan struct{} // one for each route, holds one

	mutes atomic.Pointer[[]audit.Mute]

	mu       sync.Mutex
	troubles map[string]error // of routes, why they are not told at present
}

// New returns a dispatcher. It starts nothing.
func New(o Options) *Dispatcher {
	d := &Dispatcher{o: o, troubles: make(map[string]error)}
	d.mutes.Store(new([]audit.Mute))
	for range o.Routes {
		d.grown = append(d.grown, make(chan struct{}, 1))
	}
	return d
}

// Recipients says who is to be told of an event.
func (d *Dispatcher) Recipients(e audit.Event) []audit.Recipient {
	if d.muted(e, time.Now()) {
		return nil
	}
	return Recipients(d.o.Routes, e)
}

// Mute has nobody told of what mutes say, instead of what was muted before.
func (d *Dispatcher) Mute(mutes []audit.Mute) { d.mutes.Store(&mutes) }

func (d *Dispatcher) muted(e audit.Event, now time.Time) bool {
	return slices.ContainsFunc(*d.mutes.Load(), func(m audit.Mute) bool { return m.Mutes(e, now) })
}

// Grown tells that there may be letters. It does not block.
func (d *Dispatcher) Grown() {
	for _, c := range d.grown {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// Troubles are why sinks are not told at present.
func (d *Dispatcher) Troubles() []error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []error
	for _, r := range d.o.Routes {
		if err := d.troubles[r.Name]; err != nil {
			out = append(out, fmt.Errorf("%s: %w", r.Name, err))
		}
	}
	return out
}

func (d *Dispatcher) note(name string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.troubles[name] = err
}

// schedule has the waits before the attempts (Standard Webhooks 1.0.0, "Retry
// schedule"): 75 hours and a half, until a message is given up.
var schedule = []time.Duration{
	0, 5 * time.Second, 5 * time.Minute, 30 * time.Minute, 2 * time.Hour, 5 * time.Hour, 10 * time.Hour, 14 * time.Hour, 20 * time.Hour, 24 * time.Hour,
}

// SendTimeout is what a sink is given to take a message.
const SendTimeout = 20 * time.Second

const (
	lettersMost = 500 // looked at in one go
	itemsMost   = 50  // in a message
	parallel    = 4   // messages of one sink that are under way
	breakAfter  = 5   // messages not taken in a row, after which a sink is left alone for
	breakFor    = time.Minute
	idle        = time.Hour // without letters, when nobody wakes
	storeRetry  = 10 * time.Second
)

// Run delivers until ctx ends.
func (d *Dispatcher) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for i, r := range d.o.Routes {
		wg.Go(func() { d.serve(ctx, r, d.grown[i]) })
		if r.Remind > 0 {
			wg.Go(func() { d.remind(ctx, r) })
		}
	}
	wg.Wait()
	<-ctx.Done()
	return nil
}

// remindEvery is how often what is open is looked through.
const remindEvery = time.Minute

// remind has a sink told again of what is open, until ctx ends.
func (d *Dispatcher) remind(ctx context.Context, r Route) {
	tick := time.NewTicker(remindEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if err := d.remindNow(ctx, r, time.Now()); err != nil && ctx.Err() == nil {
			d.o.Log.Warn().Err(err).Str("sink", r.Name).Msg("what is still open could not be looked through; it is tried again")
		}
	}
}

// remindNow enters what the sink is to be told again: what it was told as it came.
func (d *Dispatcher) remindNow(ctx context.Context, r Route, now time.Time) error {
	if r.Quiet.End(now) != now {
		return nil
	}
	letters, err := d.o.Outbox.Unheeded(ctx, r.Name, now.Add(-r.Remind))
	if err != nil {
		return err
	}
	var indexes []int64
	for _, l := range letters {
		e, err := audit.ParseLeaf(l.Leaf)
		if err != nil {
			return fmt.Errorf("entry %d: %w", l.Index, err)
		}
		if _, told := r.due(e); told && !r.digested(e) && !d.muted(e, now) {
			indexes = append(indexes, l.Index)
		}
	}
	if len(indexes) == 0 {
		return nil
	}
	if err := d.o.Outbox.Remind(ctx, r.Name, indexes, now); err != nil {
		return err
	}
	d.Grown()
	return nil
}

// serve delivers to one sink until ctx ends, or nobody is there any more.
func (d *Dispatcher) serve(ctx context.Context, r Route, grown <-chan struct{}) {
	for ctx.Err() == nil {
		wait, failed, err := d.round(ctx, r)
		var gone *Failure
		switch {
		case errors.As(err, &gone) && gone.Gone:
			d.o.Log.Error().Err(err).Str("sink", r.Name).Msg("nobody is there any more: the sink is told nothing until the next start, what it was to be told is kept")
			return
		case err != nil && ctx.Err() == nil:
			d.o.Log.Warn().Err(err).Str("sink", r.Name).Msg("the outbox could not be read or written; it is tried again")
			wait = storeRetry
		}
		wake := grown
		if failed >= breakAfter {
			wait = max(wait, breakFor+rand.N(breakFor/4))
			wake = nil // new letters do not shorten that
		}
		select {
		case <-time.After(wait):
		case <-wake:
		case <-ctx.Done():
		}
	}
}

// round delivers what is due, and tells how long there is nothing more.
func (d *Dispatcher) round(ctx context.Context, r Route) (wait time.Duration, failed int, err error) {
	// What is due within Wait goes along with what is due now.
	now := time.Now()
	letters, err := d.o.Outbox.Due(ctx, r.Name, now.Add(r.Wait), lettersMost)
	if err != nil {
		return 0, 0, err
	}
	lanes, err := r.sort(letters, now, len(letters) == lettersMost)
	if err != nil {
		return 0, 0, err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	var mu sync.Mutex
	broken := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return failed >= breakAfter
	}
	for _, lane := range lanes {
		g.Go(func() error {
			for _, b := range lane {
				if broken() {
					return nil // the rest need not find out each by itself
				}
				taken, err := d.deliver(gctx, r, b)
				if err != nil {
					return err
				}
				mu.Lock()
				if failed++; taken {
					failed = 0
				}
				mu.Unlock()
				if !taken {
					return nil // what follows waits for it
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return 0, failed, err
	}
	if len(lanes) > 0 && failed == 0 {
		d.note(r.Name, nil)
		return 0, 0, nil // there may be more
	}
	next, err := d.o.Outbox.NextDue(ctx, r.Name)
	switch {
	case err != nil:
		return 0, failed, err
	case next.IsZero():
		return idle, failed, nil
	}
	return max(time.Until(next), time.Second), failed, nil
}

// A batch is what becomes one message.
type batch struct {
	id     string // "" until it is sealed
	items  []Item
	tried  int
	digest bool

	reminder int // of its first letter
}

// sort makes batches of letters, in lanes of which each is in order, and keeps the lanes
// in which something is due. A batch that may have been cut off at the end is left for the
// next time.
func (r Route) sort(letters []audit.Letter, now time.Time, cut bool) ([][]*batch, error) {
	lanes, due := make(map[string][]*batch), make(map[string]bool)
	var order []string
	for _, l := range letters {
		e, err := audit.ParseLeaf(l.Leaf)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", l.Index, err)
		}
		item := Item{Index: l.Index, Leaf: l.Leaf, Event: e, Clients: -1}
		digest := r.digested(e)
		lane, alone := e.Ref.String(), true
		switch {
		case l.Batch != "":
			lane, alone = "batch "+l.Batch, false
		case l.Reminder > 0:
			lane, alone = fmt.Sprintf("reminder %s/%s", e.Ref.Upstream, e.Ref.Repository), false
		case digest:
			lane, alone = "digest", false
		case r.ByRepository && e.Severity() < audit.Critical && e.Ref != (audit.Ref{}):
			lane, alone = e.Ref.Upstream+"/"+e.Ref.Repository, false
		}
		ready := !l.At.After(now)
		if alone && !ready {
			continue
		}
		if due[lane] = due[lane] || ready; lanes[lane] == nil {
			order = append(order, lane)
		}
		list := lanes[lane]
		if n := len(list); n == 0 || alone || l.Batch == "" && len(list[n-1].items) >= itemsMost {
			list = append(list, &batch{id: l.Batch, tried: l.Attempts, digest: digest, reminder: l.Reminder})
		}
		b := list[len(list)-1]
		b.items = append(b.items, item)
		lanes[lane] = list
	}
	var out [][]*batch
	for i, lane := range order {
		if cut && i == len(order)-1 && lanes[lane][0].id != "" && i > 0 {
			break
		}
		if due[lane] {
			out = append(out, lanes[lane])
		}
	}
	return out, nil
}

// deliver sends one message and records what became of it. It tells whether the sink
// took it or never will.
func (d *Dispatcher) deliver(ctx context.Context, r Route, b *batch) (done bool, err error) {
	now := time.Now()
	if b.id == "" {
		b.id = b.items[0].Event.ID.String()
		if b.reminder > 0 {
			b.id += fmt.Sprintf("-r%d", b.reminder)
		}
		var indexes []int64
		for _, i := range b.items {
			indexes = append(indexes, i.Index)
		}
		if err := d.o.Outbox.Seal(ctx, r.Name, b.id, indexes); err != nil {
			return false, err
		}
	}
	d.count(ctx, b.items)
	sctx, cancel := context.WithTimeout(ctx, SendTimeout)
	defer cancel()
	m, terr := r.Templates.apply(Message{ID: b.id + "." + r.Name, Origin: d.o.Origin, Items: b.items, Digest: b.digest, Reminder: b.reminder})
	if terr != nil {
		d.o.Log.Warn().Err(terr).Str("sink", r.Name).Msg("the template does not work on this message: it says what is built in")
	}
	serr := r.Sink.Send(sctx, m)
	if ctx.Err() != nil {
		return false, ctx.Err() // whatever came of it, it is sent again under the same ID
	}
	if serr == nil {
		return true, d.o.Outbox.Settle(ctx, audit.Delivery{Sink: r.Name, Batch: b.id, Sent: true})
	}
	d.note(r.Name, serr)
	var f *Failure
	errors.As(serr, &f)
	out := audit.Delivery{Sink: r.Name, Batch: b.id, Error: Clip(serr.Error(), errorMost)}
	if f != nil && f.Gone {
		out.Again = now.Add(schedule[len(schedule)-1])
		return false, errors.Join(serr, d.o.Outbox.Settle(ctx, out))
	}
	if b.tried+1 >= len(schedule) {
		return true, d.bury(ctx, r, b, out)
	}
	wait := schedule[b.tried+1]
	wait += time.Duration((rand.Float64()*.4 - .2) * float64(wait))
	if f != nil {
		wait = max(wait, f.After)
	}
	out.Again = now.Add(wait)
	d.o.Log.Warn().Err(serr).Str("sink", r.Name).Int("attempt", b.tried+1).Stringer("again_in", wait.Round(time.Second)).Msg("a message was not taken")
	return false, d.o.Outbox.Settle(ctx, out)
}

// bury gives a message up. That it was not taken is told to the other sinks first.
func (d *Dispatcher) bury(ctx context.Context, r Route, b *batch, out audit.Delivery) error {
	u := audit.Undelivered{Sink: r.Name, Attempts: b.tried + 1, Error: out.Error}
	for _, i := range b.items[:min(len(b.items), 100)] {
		u.Entries = append(u.Entries, i.Index)
	}
	d.o.Log.Error().Str("sink", r.Name).Ints64("entries", u.Entries).Str("err", u.Error).Msg("a message is given up")
	if d.o.Undelivered != nil {
		if err := d.o.Undelivered(ctx, u); err != nil {
			return err
		}
	}
	out.Dead = true
	return d.o.Outbox.Settle(ctx, out)
}

// count finds out how many clients have what items are about.
func (d *Dispatcher) count(ctx context.Context, items []Item) {
	if d.o.Clients == nil {
		return
	}
	for i := range items {
		old := items[i].Event.Old
		if old == nil {
			continue
		}
		if n, err := d.o.Clients(ctx, old.Digest); err == nil {
			items[i].Clients = n
		}
	}
}

// errorMost bounds what is kept of a sink's words in bytes.
const errorMost = 500

// Clip shortens a text to a number of bytes, at the end of a character.
func Clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	most = max(0, most-len("…"))
	for most > 0 && !utf8.RuneStart(s[most]) {
		most--
	}
	return s[:most] + "…"
}
