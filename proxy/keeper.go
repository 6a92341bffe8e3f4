package proxy

import (
	"context"
	"errors"
	"io/fs"
	"iter"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"tidemark/audit"
)

// A Keeper completes and pins the bytes of what is served although it may not be
// the head: upstream may forget it, and a hold that cannot be pulled would be an
// error. Create it with NewKeeper; call Run, once.
type Keeper struct {
	contents *Contents
	kept     func(context.Context) iter.Seq2[audit.Tag, error]
	log      zerolog.Logger

	mu   sync.Mutex
	todo map[task]attempt
	wake chan struct{} // holds one
}

// A task is a digest of a ref whose bytes are to be here.
type task struct {
	ref  audit.Ref
	dgst digest.Digest
}

// An attempt is when a task is tried, and how long it waits after that.
type attempt struct {
	at   time.Time
	wait time.Duration
}

// NewKeeper returns a keeper of the refs that kept yields: those whose served
// bytes are promised. It starts nothing.
func NewKeeper(contents *Contents, kept func(context.Context) iter.Seq2[audit.Tag, error], log zerolog.Logger) *Keeper {
	return &Keeper{contents: contents, kept: kept, log: log, todo: make(map[task]attempt), wake: make(chan struct{}, 1)}
}

// Recorded is told of an event. It pins what is served from then on, and does
// not wait for the rest.
func (k *Keeper) Recorded(e audit.Event) {
	switch {
	case e.Policy.Served == "":
	case e.Type == audit.Held, e.Type == audit.Violation, e.Type == audit.Deleted, e.Type == audit.Released:
		k.contents.cache.Keep(e.Policy.Served, true)
		k.add(task{e.Ref, e.Policy.Served})
	case e.Type.Moves() && e.Policy.Mode == audit.Cooldown && e.Old != nil && e.Old.Digest != e.Policy.Served:
		// Upstream has left what a cooldown may serve one day, and may forget it
		// before. What was taken back will not be served, but that is told next.
		k.add(task{e.Ref, e.Old.Digest})
	case e.Type == audit.Withdrawn:
		k.drop(task{e.Ref, e.New.Digest})
	}
}

func (k *Keeper) add(t task) {
	k.mu.Lock()
	k.todo[t] = attempt{}
	k.mu.Unlock()
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

func (k *Keeper) drop(t task) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.todo, t)
}

const (
	keepersMost = 8               // tasks at a time: one upstream that stalls does not hold up the others
	keepRetry   = time.Minute     // after a failure, doubling
	keepMost    = 6 * time.Hour   // up to here
	keepListing = 5 * time.Second // after what is promised could not be listed
)

// Run completes what is promised until ctx ends, and tries again what it could
// not.
func (k *Keeper) Run(ctx context.Context) error {
	for !k.list(ctx) {
		select {
		case <-time.After(keepListing):
		case <-ctx.Done():
			return nil
		}
	}
	var g errgroup.Group
	g.SetLimit(keepersMost)
	for {
		next := k.start(ctx, &g)
		var due <-chan time.Time
		if !next.IsZero() {
			due = time.After(time.Until(next))
		}
		select {
		case <-k.wake:
		case <-due:
		case <-ctx.Done():
			return g.Wait()
		}
	}
}

// list adds everything that is promised, and tells whether it could be listed.
func (k *Keeper) list(ctx context.Context) bool {
	for t, err := range k.kept(ctx) {
		if err != nil {
			if ctx.Err() == nil {
				k.log.Error().Err(err).Msg("what is held is unknown, and may be incomplete; it is looked at again")
			}
			return false
		}
		if t.State.Served != "" {
			k.add(task{t.Ref, t.State.Served})
		}
	}
	return true
}

// start begins the tasks that are due, as far as there is a place for them, and
// returns when the next one is.
func (k *Keeper) start(ctx context.Context, g *errgroup.Group) (next time.Time) {
	now := time.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	for t, a := range k.todo {
		if a.at.After(now) {
			if next.IsZero() || a.at.Before(next) {
				next = a.at
			}
			continue
		}
		if !g.TryGo(func() error { k.try(ctx, t, a); return nil }) {
			return time.Time{} // who ends wakes us
		}
		delete(k.todo, t)
	}
	return next
}

// try completes a task, or puts it back for later.
func (k *Keeper) try(ctx context.Context, t task, a attempt) {
	err := k.contents.Complete(ctx, t.ref, t.dgst)
	if err != nil && ctx.Err() == nil {
		gone := errors.Is(err, fs.ErrNotExist)
		line := k.log.Warn()
		if gone {
			line = k.log.Error() // upstream has forgotten it: nobody will have it again
		}
		if gone && a.wait == keepMost {
			line.Err(err).Str("upstream", t.ref.Upstream).Str("repo", t.ref.Repository).Str("tag", t.ref.Tag).
				Str("digest", t.dgst.String()).Msg("what is held is incomplete and will stay so")
			return
		}
		a.wait = min(keepMost, max(keepRetry, 2*a.wait))
		line.Err(err).Str("upstream", t.ref.Upstream).Str("repo", t.ref.Repository).Str("tag", t.ref.Tag).
			Str("digest", t.dgst.String()).Stringer("again_in", a.wait).Msg("what is held could not be completed")
		k.mu.Lock()
		if _, again := k.todo[t]; !again {
			k.todo[t] = attempt{time.Now().Add(a.wait), a.wait}
		}
		k.mu.Unlock()
	}
	select {
	case k.wake <- struct{}{}:
	default:
	}
}
