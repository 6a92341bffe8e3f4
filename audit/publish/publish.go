// Package publish copies a log's checkpoints to places that its operator does
// not control alone, so that a log that was taken back is found out there.
package publish

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"tidemark/audit"
)

// A Sink is one place. Put may be called with the same checkpoint again, after a
// crash, and must take that for done.
type Sink interface {
	// Name is what the log calls the sink. It is no secret.
	Name() string

	// ID tells sinks apart. It is no secret either.
	ID() string

	Put(ctx context.Context, signed audit.Signed) error
}

// A Publisher brings the newest checkpoint to every sink. How far a sink is
// stands in the ledger's memory: a restart goes on from there.
type Publisher struct {
	last   func() audit.Signed
	origin string
	memory audit.Memory
	sinks  []Sink
	log    zerolog.Logger
	grown  []chan struct{} // one for each sink, holds one

	mu       sync.Mutex
	troubles map[string]error // why a sink, by its ID, does not have the newest checkpoint
}

// New returns a publisher of what last returns. It starts nothing.
func New(origin string, last func() audit.Signed, m audit.Memory, sinks []Sink, log zerolog.Logger) *Publisher {
	p := &Publisher{last: last, origin: origin, memory: m, sinks: sinks, log: log, troubles: make(map[string]error)}
	for range sinks {
		p.grown = append(p.grown, make(chan struct{}, 1))
	}
	return p
}

// Signed tells that there is a new checkpoint. It does not block.
func (p *Publisher) Signed() {
	for _, c := range p.grown {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// Run publishes until ctx ends.
func (p *Publisher) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for i, s := range p.sinks {
		wg.Go(func() { p.serve(ctx, s, p.grown[i]) })
	}
	wg.Wait()
	<-ctx.Done()
	return nil
}

// Waits between attempts double from the first to the most, with jitter.
const (
	retryFirst = 5 * time.Second
	retryMost  = time.Hour
	putTimeout = 20 * time.Second
)

func (p *Publisher) serve(ctx context.Context, s Sink, grown <-chan struct{}) {
	wait := time.Duration(0)
	for {
		err := p.put(ctx, s)
		p.note(s, err)
		var again <-chan time.Time
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			wait = min(retryMost, max(retryFirst, 2*wait))
			p.log.Warn().Err(err).Str("sink", s.Name()).Stringer("again_in", wait).Msg("the checkpoint could not be published")
			again = time.After(wait + rand.N(wait/5))
		default:
			wait = 0
		}
		select {
		case <-again:
		case <-grown:
			if again != nil { // a sink in trouble is not asked more often for that
				select {
				case <-again:
				case <-ctx.Done():
					return
				}
			}
		case <-ctx.Done():
			return
		}
	}
}

func (p *Publisher) note(s Sink, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		delete(p.troubles, s.ID())
		return
	}
	p.troubles[s.ID()] = fmt.Errorf("%s: %w", s.Name(), err)
}

// Troubles are why sinks do not have the newest checkpoint.
func (p *Publisher) Troubles() []error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []error
	for _, id := range slices.Sorted(maps.Keys(p.troubles)) {
		out = append(out, p.troubles[id])
	}
	return out
}

// put brings the newest checkpoint to s, if it is not there.
func (p *Publisher) put(ctx context.Context, s Sink) error {
	signed := p.last()
	key := "publish " + s.ID()
	cursor := fmt.Sprintf("%s %d %v", p.origin, signed.Tree.N, signed.Tree.Hash)
	done, err := p.memory.Recall(ctx, key)
	if err != nil || len(signed.Note) == 0 || done == cursor {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, putTimeout)
	defer cancel()
	if err := s.Put(ctx, signed); err != nil {
		return err
	}
	return p.memory.Remember(ctx, key, cursor)
}
