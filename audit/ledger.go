package audit

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/rs/zerolog"
	"golang.org/x/sync/singleflight"
)

// ErrLedger reports a ref that cannot be served, because it was never recorded
// and cannot be now: nothing is told to a client before it is in the ledger.
var ErrLedger = errors.New("the ledger cannot be written")

// An Ask finds out what upstream says about a ref. known is what the ledger
// has; a digest other than known.Head must have been checked against the bytes
// of the manifest, and these must be in the cache. An error means that upstream
// gave no answer about the tag, whatever the reason.
type Ask func(ctx context.Context, known State) (Observation, error)

// Options configure a Ledger. Store is required.
type Options struct {
	Store Store

	// TTL is how long an answer of upstream is good. 0 asks at every pull, once
	// for all who wait at the same time.
	TTL time.Duration

	// Background answers at once with what is recorded and asks behind.
	Background bool

	// AskTimeout bounds one Ask. It goes on when the client that caused it has
	// left. Default 30 s.
	AskTimeout time.Duration

	// Recorded, if set, is called after an event was committed under index, and
	// before anyone is answered by it.
	Recorded func(index int64, e Event)

	// Now is the clock. Default time.Now.
	Now func() time.Time

	Log zerolog.Logger
}

// A Ledger answers which digest a ref means. Create it with New; call Run, once,
// to have confirmations recorded and background work awaited.
type Ledger struct {
	store      Store
	policy     Policy
	ttl        time.Duration
	background bool
	askTimeout time.Duration
	recorded   func(int64, Event)
	now        func() time.Time
	log        zerolog.Logger

	flights singleflight.Group // one Ask for each ref at a time
	wg      sync.WaitGroup     // Asks; Run waits for them

	unwritable atomic.Pointer[error] // why the last write failed, nil after a good one

	mu        sync.Mutex
	recent    *simplelru.LRU[Ref, recent]
	confirmed map[Ref]time.Time // not yet in the store
}

// recent is what is remembered of a ref so that answers within TTL touch no
// store. Forgetting it costs a query, nothing else.
type recent struct {
	state   State
	checked time.Time // when upstream last answered; zero when it only was loaded
	stale   error     // why the last question got no answer, nil if it did
}

// recentMost bounds the refs remembered: about 20 MB of them.
const recentMost = 1 << 16

// New returns a ledger on o.Store. It starts nothing.
func New(o Options) *Ledger {
	lru, err := simplelru.NewLRU[Ref, recent](recentMost, nil)
	if err != nil {
		panic("audit: " + err.Error())
	}
	l := &Ledger{
		store: o.Store, ttl: o.TTL, background: o.Background, askTimeout: o.AskTimeout,
		recorded: o.Recorded, now: o.Now, log: o.Log,
		recent: lru, confirmed: make(map[Ref]time.Time),
	}
	if l.askTimeout == 0 {
		l.askTimeout = 30 * time.Second
	}
	if l.recorded == nil {
		l.recorded = func(int64, Event) {}
	}
	if l.now == nil {
		l.now = time.Now
	}
	return l
}

// confirmEvery is how often confirmations are written down. Until then a crash
// makes the interval of the next move wider, never wrong.
const confirmEvery = 10 * time.Second

// Run records confirmations until ctx ends, and then those that are left.
func (l *Ledger) Run(ctx context.Context) error {
	tick := time.NewTicker(confirmEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			l.confirm(ctx)
		case <-ctx.Done():
			l.wg.Wait()
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			l.confirm(ctx)
			return nil
		}
	}
}

func (l *Ledger) confirm(ctx context.Context) {
	l.mu.Lock()
	batch := l.confirmed
	l.confirmed = make(map[Ref]time.Time)
	l.mu.Unlock()
	if len(batch) == 0 {
		return
	}
	err := l.store.Confirm(ctx, batch)
	if err == nil {
		l.unwritable.Store(nil)
	} else {
		l.unwritable.Store(&err)
		l.log.Warn().Err(err).Int("refs", len(batch)).Msg("confirmations could not be recorded yet")
		l.mu.Lock()
		for ref, t := range batch {
			if t.After(l.confirmed[ref]) {
				l.confirmed[ref] = t
			}
		}
		l.mu.Unlock()
	}
}

// An Answer is what a ref means, as far as is known.
type Answer struct {
	State

	// Asked tells that upstream was asked, by this caller or one before it in
	// the same moment.
	Asked bool

	// New tells that what is served changed with this answer.
	New bool

	// Stale is why the answer could not be confirmed: upstream's error, or the
	// ledger's. The state is then the last one recorded.
	Stale error
}

// Resolve says which digest ref means: from memory while the last answer is
// good, else by asking upstream through ask. What it returns is in the ledger,
// durably. When upstream has no answer, or the ledger cannot be written, a ref
// that is known is answered with what is recorded, and Stale says why; one that
// is not known is an error.
func (l *Ledger) Resolve(ctx context.Context, ref Ref, ask Ask) (Answer, error) {
	l.mu.Lock()
	r, ok := l.recent.Get(ref)
	l.mu.Unlock()
	if ok && !r.checked.IsZero() && l.now().Sub(r.checked) < l.ttl {
		return Answer{State: r.state}, nil
	}
	// The ask is everybody's: it goes on when the one who caused it leaves.
	ch := l.flights.DoChan(ref.String(), func() (any, error) {
		l.wg.Add(1)
		defer l.wg.Done()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.askTimeout)
		defer cancel()
		return l.refresh(ctx, ref, ask)
	})
	if l.background {
		s, err := l.known(ctx, ref)
		if err == nil && s.Known() {
			return Answer{State: s, Stale: r.stale}, nil
		}
	}
	select {
	case res := <-ch:
		if res.Err != nil {
			return Answer{}, res.Err
		}
		return res.Val.(Answer), nil
	case <-ctx.Done():
		return Answer{}, context.Cause(ctx)
	}
}

// known returns what is recorded of ref, from memory or from the store.
func (l *Ledger) known(ctx context.Context, ref Ref) (State, error) {
	l.mu.Lock()
	r, ok := l.recent.Get(ref)
	confirmed := l.confirmed[ref]
	l.mu.Unlock()
	if ok {
		return r.state, nil
	}
	s, err := l.store.State(ctx, ref)
	if err != nil {
		return State{}, fmt.Errorf("read the ledger: %w", err)
	}
	if confirmed.After(s.LastConfirmed) {
		s.LastConfirmed = confirmed
	}
	return s, nil
}

// refresh asks upstream and records what it says.
func (l *Ledger) refresh(ctx context.Context, ref Ref, ask Ask) (Answer, error) {
	s, err := l.known(ctx, ref)
	if err != nil {
		return Answer{}, fmt.Errorf("resolve %s: %w: %w", ref, ErrLedger, err)
	}
	seen, err := ask(ctx, s)
	now := l.now()
	if err != nil {
		if !s.Known() {
			return Answer{}, fmt.Errorf("resolve %s: %w", ref, err)
		}
		l.unconfirmed(ref, s, err)
		return Answer{State: s, Asked: true, Stale: err}, nil
	}
	if s.Known() && seen.Digest == s.Head {
		s, _ = l.policy.Next(ref, s, nil, seen, now)
		l.remember(ref, s, now, true)
		return Answer{State: s, Asked: true}, nil
	}
	next, err := l.advance(ctx, ref, s, seen, now)
	if err != nil {
		l.unwritable.Store(&err)
		l.forget(ref) // it may be recorded nevertheless: the store knows
		if l.background {
			l.log.Warn().Err(err).Str("upstream", ref.Upstream).Str("repo", ref.Repository).Str("tag", ref.Tag).Msg("a move could not be recorded and is not served")
		}
		if !s.Known() {
			return Answer{}, fmt.Errorf("resolve %s: %w: %w", ref, ErrLedger, err)
		}
		return Answer{State: s, Asked: true, Stale: fmt.Errorf("%w: %w", ErrLedger, err)}, nil
	}
	l.unwritable.Store(nil)
	l.remember(ref, next, now, false)
	return Answer{State: next, Asked: true, New: next.Served != s.Served}, nil
}

// recordTimeout bounds one write of the ledger.
const recordTimeout = 10 * time.Second

// advance records an observation that is not what was known.
func (l *Ledger) advance(ctx context.Context, ref Ref, known State, seen Observation, now time.Time) (State, error) {
	// However long upstream took to answer: this is the ledger's own time.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	var events []Event
	s, err := l.store.Advance(ctx, ref, func(s State, past History) (State, []Event) {
		if known.Head == s.Head && known.LastConfirmed.After(s.LastConfirmed) {
			s.LastConfirmed = known.LastConfirmed // not written down yet
		}
		s, events = l.policy.Next(ref, s, past, seen, now)
		for i := range events {
			events[i].ID = newID()
		}
		return s, events
	})
	if err != nil {
		return State{}, err
	}
	for i, e := range events {
		l.recorded(s.Index-int64(len(events)-1-i), e)
	}
	return s, nil
}

// newID returns an event's identity.
func newID() uuid.UUID {
	id, err := uuid.NewV7()
	if err != nil {
		panic("audit: no randomness: " + err.Error())
	}
	return id
}

func (l *Ledger) remember(ref Ref, s State, checked time.Time, confirmed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recent.Add(ref, recent{state: s, checked: checked})
	if confirmed {
		l.confirmed[ref] = s.LastConfirmed
	}
}

// unconfirmed keeps why upstream did not answer, for those who do not wait for
// it, and says so once for each ref that nobody waits for.
func (l *Ledger) unconfirmed(ref Ref, s State, why error) {
	l.mu.Lock()
	r, _ := l.recent.Get(ref)
	first := r.stale == nil
	l.recent.Add(ref, recent{state: s, checked: time.Time{}, stale: why})
	l.mu.Unlock()
	if l.background && first {
		l.log.Warn().Err(why).Str("upstream", ref.Upstream).Str("repo", ref.Repository).Str("tag", ref.Tag).Msg("tag is served unconfirmed")
	}
}

func (l *Ledger) forget(ref Ref) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recent.Remove(ref)
}

// Unwritable is why the last attempt to record something failed, or nil.
func (l *Ledger) Unwritable() error {
	if err := l.unwritable.Load(); err != nil {
		return *err
	}
	return nil
}
