package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"
	"golang.org/x/sync/singleflight"
)

// ErrLedger reports a ref that cannot be served, because it was never recorded
// and cannot be now: nothing is told to a client before it is in the ledger.
var ErrLedger = errors.New("the ledger cannot be written")

// ErrDenied reports a ref that a rule denies: nothing is served for it.
var ErrDenied = errors.New("the policy denies this tag")

// ErrTooNew reports a ref of which nothing is old enough yet to be served.
var ErrTooNew = errors.New("nothing that this tag meant is old enough yet")

// ErrDeleted reports a ref that upstream deleted, under a rule that follows it.
var ErrDeleted = errors.New("upstream has deleted this tag")

// A Question is what an Ask is asked.
type Question struct {
	Known State // what the ledger has

	// Corroborate tells that one more absence would make the ref deleted: then
	// the answer needs another sign of it.
	Corroborate bool

	// Trust tells that what stands beside the head is to be looked at, too.
	Trust bool
}

// An Ask finds out what upstream says about a ref. A digest other than the
// known head must have been checked against the bytes of the manifest, and these
// must be in the cache. An error means that upstream gave no answer about the
// tag, whatever the reason; that it contradicts itself is an InconsistentError.
type Ask func(ctx context.Context, q Question) (Observation, error)

// Options configure a Ledger. Store is required.
type Options struct {
	Store  Store
	Memory Memory  // nil remembers nothing
	Policy *Policy // nil observes

	// Compare finds out what changed between two digests of a ref, as far as it
	// can be told soon. had is what stood beside the old one, nil if that is to be found
	// out, too. Nil tells nothing.
	Compare func(ctx context.Context, ref Ref, old, new digest.Digest, had *Trust) *Comparison

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

	// Notify, if set, says who is to be told of an event. It must not wait for anything.
	Notify func(Event) []Recipient

	// Exposed, if set, counts who got a digest. With it, and a Memory, it is told when a
	// digest is denied that clients got before.
	Exposed func(ctx context.Context, d digest.Digest) (Exposed, error)

	// Answered, if set, is told of every question to an upstream how it ended.
	Answered func(ref Ref, err error)

	// Now is the clock. Default time.Now.
	Now func() time.Time

	Log zerolog.Logger
}

// A Ledger answers which digest a ref means. Create it with New; call Run, once,
// to have confirmations recorded and background work awaited.
type Ledger struct {
	store      Store
	memory     Memory
	policy     atomic.Pointer[Policy]
	compare    func(context.Context, Ref, digest.Digest, digest.Digest, *Trust) *Comparison
	ttl        time.Duration
	background bool
	askTimeout time.Duration
	recorded   func(int64, Event)
	notify     func(Event) []Recipient
	answered   func(Ref, error)
	exposed    func(context.Context, digest.Digest) (Exposed, error)
	now        func() time.Time
	log        zerolog.Logger

	flights singleflight.Group // one Ask for each ref at a time
	wg      sync.WaitGroup     // Asks; Run waits for them

	unwritable atomic.Pointer[error] // why the last write failed, nil after a good one

	// deciding is held while a policy decides and its decision is recorded, and
	// alone while the policy is changed: what is recorded after the change was
	// decided by the new one.
	deciding sync.RWMutex

	mu        sync.Mutex
	recent    *simplelru.LRU[Ref, recent]
	confirmed map[Ref]time.Time // not yet in the store
	epoch     uint64            // grows with every decision, policy and Ask: what was read before is not to be remembered
}

// recent is what is remembered of a ref so that answers within TTL touch no
// store. Forgetting it costs a query, nothing else.
type recent struct {
	state   State
	rule    *Rule
	checked time.Time // when upstream last answered; zero when it only was loaded
	due     time.Time // when the answer may be another whatever upstream says, zero for never
	stale   error     // why the last question got no answer, nil if it did
}

// fresh tells whether the answer is good without asking anybody.
func (r recent) fresh(now time.Time, ttl time.Duration) bool {
	return !r.checked.IsZero() && now.Sub(r.checked) < ttl && (r.due.IsZero() || now.Before(r.due))
}

// recentMost bounds the refs remembered: about 30 MB of them.
const recentMost = 1 << 16

// New returns a ledger on o.Store. It starts nothing.
func New(o Options) *Ledger {
	lru, err := simplelru.NewLRU[Ref, recent](recentMost, nil)
	if err != nil {
		panic("audit: " + err.Error())
	}
	l := &Ledger{
		store: o.Store, memory: o.Memory, compare: o.Compare, ttl: o.TTL, background: o.Background, askTimeout: o.AskTimeout,
		recorded: o.Recorded, notify: o.Notify, answered: o.Answered, exposed: o.Exposed, now: o.Now, log: o.Log,
		recent: lru, confirmed: make(map[Ref]time.Time),
	}
	l.policy.Store(o.Policy)
	if l.compare == nil {
		l.compare = func(context.Context, Ref, digest.Digest, digest.Digest, *Trust) *Comparison { return nil }
	}
	if l.answered == nil {
		l.answered = func(Ref, error) {}
	}
	if l.askTimeout == 0 {
		l.askTimeout = 30 * time.Second
	}
	if l.notify == nil {
		l.notify = func(Event) []Recipient { return nil }
	}
	if l.recorded == nil {
		l.recorded = func(int64, Event) {}
	}
	if l.now == nil {
		l.now = time.Now
	}
	return l
}

// Run records confirmations until ctx ends, and then those that are left, and
// that the ledger is awake.
func (l *Ledger) Run(ctx context.Context) error {
	tick := time.NewTicker(confirmEvery)
	defer tick.Stop()
	for awake := 0; ; {
		select {
		case <-tick.C:
			l.confirm(ctx)
			if awake++; l.memory != nil && time.Duration(awake)*confirmEvery >= aliveEvery {
				awake = 0
				l.note(ctx)
			}
		case <-ctx.Done():
			l.wg.Wait()
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			l.confirm(ctx)
			if l.memory != nil {
				l.note(ctx)
			}
			return nil
		}
	}
}

// An Answer is what a ref means, as far as is known.
type Answer struct {
	State
	Rule *Rule

	// Asked tells that upstream was asked, by this caller or one before it in
	// the same moment.
	Asked bool

	// New tells that what is served changed with this answer.
	New bool

	// Stale is why the answer could not be confirmed: upstream's error, or the
	// ledger's. The state is then the last one recorded.
	Stale error
}

// Withheld is the head that is not served, since when it may be if nothing
// happens until then, and the word for why. It is "" when the head is served.
func (a Answer) Withheld() (head digest.Digest, until *time.Time, why string) {
	return withheld(a.State, a.Rule)
}

func withheld(s State, r *Rule) (head digest.Digest, until *time.Time, why string) {
	c, _ := s.candidate(s.Head)
	if atOnce := !r.Mode.holdsBack() && r.Mode != Deny && s.Hold == nil && !c.barred(); s.Head == s.Served || !s.Known() || atOnce {
		return "", nil, "" // at once is with the next pull
	}
	return s.Head, s.until(r), s.why(r)
}

// Resolve says which digest ref means: from memory while the last answer is
// good, else by asking upstream through ask. What it returns is in the ledger,
// durably. When upstream has no answer, or the ledger cannot be written, a ref
// that is known is answered with what is recorded, and Stale says why; one that
// is not known is an error. So are refs for which a rule has nothing to serve:
// ErrDenied, ErrTooNew, ErrDeleted. The deadline of ctx is how long the caller
// waits for upstream: past it, what is recorded is the answer, too.
func (l *Ledger) Resolve(ctx context.Context, ref Ref, ask Ask) (Answer, error) {
	l.mu.Lock()
	r, ok := l.recent.Get(ref)
	l.mu.Unlock()
	if ok && r.fresh(l.now(), l.ttl) {
		return l.servable(ref, Answer{State: r.state, Rule: r.rule})
	}
	if rule := l.policy.Load().Rule(ref); rule.Mode == Deny {
		return l.servable(ref, Answer{Rule: rule}) // nobody is asked
	}
	ch := l.fly(ctx, ref, ask)
	if l.background {
		s, _, err := l.known(ctx, ref)
		if err == nil && s.Known() {
			return l.servable(ref, Answer{State: s, Rule: l.policy.Load().Rule(ref), Stale: r.stale})
		}
	}
	select {
	case res := <-ch:
		if res.Err != nil {
			return Answer{}, res.Err
		}
		return l.servable(ref, res.Val.(Answer))
	case <-ctx.Done():
	}
	cause := context.Cause(ctx)
	if !errors.Is(cause, context.DeadlineExceeded) {
		return Answer{}, cause
	}
	s, _, err := l.known(context.WithoutCancel(ctx), ref)
	if err != nil || !s.Known() {
		return Answer{}, fmt.Errorf("resolve %s: %w", ref, cause)
	}
	return l.servable(ref, Answer{State: s, Rule: l.policy.Load().Rule(ref), Asked: true, Stale: cause})
}

// Ask is Resolve for one who knows that the answer may have changed: upstream is
// asked whatever is remembered.
func (l *Ledger) Ask(ctx context.Context, ref Ref, ask Ask) (Answer, error) {
	if rule := l.policy.Load().Rule(ref); rule.Mode == Deny {
		return l.servable(ref, Answer{Rule: rule}) // nobody is asked
	}
	l.wg.Add(1)
	defer l.wg.Done()
	a, err := l.refresh(ctx, ref, ask)
	l.mu.Lock()
	l.epoch++ // a question that was asked before has an answer from before
	l.recent.Remove(ref)
	l.mu.Unlock()
	if err != nil {
		return Answer{}, err
	}
	return l.servable(ref, a)
}

// Watch is Resolve for one who asks on a schedule: an answer that somebody else got
// within TTL will do, and otherwise upstream is asked, whatever refresh the pulls
// are given. every is how often that is at present.
func (l *Ledger) Watch(ctx context.Context, ref Ref, every time.Duration, ask Ask) (Answer, error) {
	l.mu.Lock()
	r, ok := l.recent.Get(ref)
	l.mu.Unlock()
	if ok && r.fresh(l.now(), l.ttl) {
		return Answer{State: r.state, Rule: r.rule}, nil
	}
	if rule := l.policy.Load().Rule(ref); rule.Mode == Deny {
		return l.servable(ref, Answer{Rule: rule}) // nobody is asked
	}
	scheduled := func(ctx context.Context, q Question) (Observation, error) {
		seen, err := ask(ctx, q)
		seen.Every = every
		return seen, err
	}
	select {
	case res := <-l.fly(ctx, ref, scheduled):
		if res.Err != nil {
			return Answer{}, res.Err
		}
		return res.Val.(Answer), nil
	case <-ctx.Done():
		return Answer{}, context.Cause(ctx)
	}
}

// fly asks upstream about ref, or joins who does. The ask is everybody's: it goes
// on when the one who caused it leaves.
func (l *Ledger) fly(ctx context.Context, ref Ref, ask Ask) <-chan singleflight.Result {
	return l.flights.DoChan(ref.String(), func() (any, error) {
		l.wg.Add(1)
		defer l.wg.Done()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.askTimeout)
		defer cancel()
		return l.refresh(ctx, ref, ask)
	})
}

// servable refuses an answer that has nothing to serve, or something that is denied:
// the decision that serves something else follows the next answer of upstream.
func (l *Ledger) servable(ref Ref, a Answer) (Answer, error) {
	if l.policy.Load().Denies(a.Served) {
		return Answer{}, fmt.Errorf("%s: %w: %w", ref, ErrDenied, ErrDeniedDigest)
	}
	if err := refusal(a.State, a.Rule); err != nil {
		return Answer{}, fmt.Errorf("%s: %w", ref, err)
	}
	return a, nil
}

// refusal is why nothing is served by a rule, or nil.
func refusal(s State, r *Rule) error {
	switch {
	case r.Mode == Deny:
		return fmt.Errorf("rule %q: %w", r.Name, ErrDenied)
	case s.Served == "" && s.deniedHead():
		return fmt.Errorf("%w: %w", ErrDenied, ErrDeniedDigest)
	case s.Served == "":
		until := ""
		if t := s.until(r); t != nil {
			until = " until " + t.Format(time.RFC3339)
		}
		return fmt.Errorf("rule %q%s: %w", r.Name, until, ErrTooNew)
	case !s.Deleted.IsZero() && s.Hold == nil && r.OnDeleted == DeletedRefuse:
		return fmt.Errorf("since %s: %w", s.Deleted.Format(time.RFC3339), ErrDeleted)
	}
	return nil
}

// deniedHead tells that the head is denied by its digest.
func (s State) deniedHead() bool {
	c, ok := s.candidate(s.Head)
	return ok && c.Escalated == denied
}

// known returns what is recorded of ref, from memory or from the store, and the
// epoch that it is of.
func (l *Ledger) known(ctx context.Context, ref Ref) (s State, epoch uint64, err error) {
	l.mu.Lock()
	r, ok := l.recent.Get(ref)
	confirmed, epoch := l.confirmed[ref], l.epoch
	l.mu.Unlock()
	if ok {
		return r.state, epoch, nil
	}
	if s, err = l.store.State(ctx, ref); err != nil {
		return State{}, epoch, fmt.Errorf("read the ledger: %w", err)
	}
	if confirmed.After(s.LastConfirmed) {
		s.LastConfirmed = confirmed
	}
	return s, epoch, nil
}

// refresh asks upstream and records what it says.
func (l *Ledger) refresh(ctx context.Context, ref Ref, ask Ask) (Answer, error) {
	s, epoch, err := l.known(ctx, ref)
	if err != nil {
		return Answer{}, fmt.Errorf("resolve %s: %w: %w", ref, ErrLedger, err)
	}
	a, err := l.askAbout(ctx, ref, s, epoch, ask)
	if err != nil {
		return Answer{}, err
	}
	l.mu.Lock()
	overtaken := l.epoch != epoch
	l.mu.Unlock()
	if !overtaken {
		return a, nil
	}
	// Somebody decided something meanwhile: the answer is what they decided.
	now, _, err := l.known(ctx, ref)
	if err != nil {
		return Answer{}, fmt.Errorf("resolve %s: %w: %w", ref, ErrLedger, err)
	}
	a.New = a.New || now.Served != a.Served
	a.State, a.Rule = now, l.policy.Load().Rule(ref)
	return a, nil
}

// askAbout asks upstream about ref, which is known as s.
func (l *Ledger) askAbout(ctx context.Context, ref Ref, s State, epoch uint64, ask Ask) (Answer, error) {
	policy := l.policy.Load()
	seen, err := ask(ctx, Question{Known: s, Corroborate: s.Deleted.IsZero() && s.doubted(policy, l.now(), 1), Trust: s.trustDue(l.now())})
	now := l.now()
	l.answered(ref, err)
	var bad *InconsistentError
	switch {
	case errors.As(err, &bad) && s.Known():
		return l.refuse(ctx, ref, s, epoch, bad, now), nil
	case err != nil && !s.Known():
		return Answer{}, fmt.Errorf("resolve %s: %w", ref, err)
	case err != nil:
		return l.unconfirmed(ref, s, epoch, err), nil
	}
	seen.Blind = l.blind(ref)
	if seen.Absent != nil || seen.Digest == s.Head {
		// What does not change the state does not touch the store.
		policy := l.policy.Load()
		next, events := policy.Next(ref, Record{State: s}, seen, now)
		if len(events) == 0 && unchanged(s, next) {
			return l.confirmedly(ref, next, epoch, policy, now, seen.Absent), nil
		}
	} else if s.Known() {
		if seen.Change == nil {
			seen.Change = l.compare(ctx, ref, s.Head, seen.Digest, s.Trust)
		}
		if seen.Served == nil && s.Served != "" && s.Served != s.Head && s.Served != seen.Digest {
			seen.Served = l.compare(ctx, ref, s.Served, seen.Digest, nil)
		}
	}
	next, policy, err := l.advance(ctx, ref, s, func(p *Policy, r Record) (State, []Event, error) {
		s, events := p.Next(ref, r, seen, now)
		return s, events, nil
	})
	if err != nil {
		return l.unrecorded(ref, s, err)
	}
	a := l.confirmedly(ref, next, epoch, policy, now, seen.Absent)
	a.New = next.Served != s.Served
	return a, nil
}

// confirmedly remembers what upstream's answer came to. That there is no such
// tag confirms nothing about the state, and is asked again.
func (l *Ledger) confirmedly(ref Ref, s State, epoch uint64, p *Policy, now time.Time, absent error) Answer {
	if absent != nil {
		return l.unconfirmed(ref, s, epoch, absent)
	}
	l.remember(ref, s, epoch, p, now)
	return Answer{State: s, Rule: p.Rule(ref), Asked: true}
}

// unchanged tells states apart by more than when the head was confirmed.
func unchanged(a, b State) bool {
	a.LastConfirmed = b.LastConfirmed
	return reflect.DeepEqual(a, b)
}

// unrecorded answers when the ledger could not be written.
func (l *Ledger) unrecorded(ref Ref, s State, err error) (Answer, error) {
	l.unwritable.Store(&err)
	l.forget(ref) // it may be recorded nevertheless: the store knows
	if l.background {
		l.log.Warn().Err(err).Str("upstream", ref.Upstream).Str("repo", ref.Repository).Str("tag", ref.Tag).Msg("a move could not be recorded and is not served")
	}
	if !s.Known() {
		return Answer{}, fmt.Errorf("resolve %s: %w: %w", ref, ErrLedger, err)
	}
	return Answer{State: s, Rule: l.policy.Load().Rule(ref), Asked: true, Stale: fmt.Errorf("%w: %w", ErrLedger, err)}, nil
}

// refuse records that upstream contradicts itself, and answers with what is known.
func (l *Ledger) refuse(ctx context.Context, ref Ref, s State, epoch uint64, bad *InconsistentError, now time.Time) Answer {
	if !s.refused(bad.Claimed, now) {
		next, _, err := l.advance(ctx, ref, s, func(p *Policy, r Record) (State, []Event, error) {
			s, events := p.Refuse(ref, r, bad, now)
			return s, events, nil
		})
		if err != nil {
			l.unwritable.Store(&err)
			l.log.Warn().Err(err).Str("upstream", ref.Upstream).Str("repo", ref.Repository).Str("tag", ref.Tag).Msg("that upstream contradicts itself could not be recorded")
		} else {
			s = next
		}
	}
	return l.unconfirmed(ref, s, epoch, bad)
}

// Tag is a ref as it is decided about at present.
func (l *Ledger) Tag(ref Ref, s State) Tag {
	s.LastConfirmed = l.LastConfirmed(ref, s.LastConfirmed)
	p := l.Policy()
	return Tag{ref, s, p.Rule(ref), p.Denies(s.Served)}
}

// LastConfirmed is when the head of ref was last confirmed, which may be later
// than what is written down.
func (l *Ledger) LastConfirmed(ref Ref, written time.Time) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if at := l.confirmed[ref]; at.After(written) {
		return at
	}
	return written
}

// remember keeps a state that was read in an epoch, unless that is over.
func (l *Ledger) remember(ref Ref, s State, epoch uint64, p *Policy, checked time.Time) {
	r := recent{state: s, rule: p.Rule(ref), checked: checked, due: s.due(p, ref)}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.epoch != epoch {
		l.recent.Remove(ref)
		return
	}
	l.recent.Add(ref, r)
	l.confirmed[ref] = s.LastConfirmed
}

// unconfirmed answers with s, and keeps why upstream did not answer for those who
// do not wait for it. It says so once for each ref that nobody waits for.
func (l *Ledger) unconfirmed(ref Ref, s State, epoch uint64, why error) Answer {
	rule := l.policy.Load().Rule(ref)
	l.mu.Lock()
	r, _ := l.recent.Get(ref)
	first := r.stale == nil
	if l.epoch == epoch {
		l.recent.Add(ref, recent{state: s, rule: rule, checked: time.Time{}, stale: why})
	} else {
		l.recent.Remove(ref)
	}
	l.mu.Unlock()
	if l.background && first {
		l.log.Warn().Err(why).Str("upstream", ref.Upstream).Str("repo", ref.Repository).Str("tag", ref.Tag).Msg("tag is served unconfirmed")
	}
	return Answer{State: s, Rule: rule, Asked: true, Stale: why}
}

// blind is why upstream gave no answer the last time, "" if it did. That there
// is no such tag is an answer.
func (l *Ledger) blind(ref Ref) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r, ok := l.recent.Peek(ref); ok && r.stale != nil && !errors.Is(r.stale, fs.ErrNotExist) {
		return r.stale.Error()
	}
	return ""
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
