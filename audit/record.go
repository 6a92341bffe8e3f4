package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"
)

// What the ledger writes down, and when.

// confirmEvery is how often confirmations are written down. Until then a crash
// makes the interval of the next move wider, never wrong.
const confirmEvery = 10 * time.Second

// note writes down that the ledger is awake.
func (l *Ledger) note(ctx context.Context) {
	if err := l.memory.Remember(ctx, memoryAlive, l.now().UTC().Format(time.RFC3339)); err != nil {
		l.log.Warn().Err(err).Msg("that the ledger is awake could not be written down; a gap may be told as longer than it was")
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

// recordTimeout bounds one write of the ledger.
const recordTimeout = 10 * time.Second

// advance records what next makes of a ref by the policy that decides now, which
// it returns.
func (l *Ledger) advance(ctx context.Context, ref Ref, known State, next func(*Policy, Record) (State, []Event, error)) (State, *Policy, error) {
	// However long upstream took to answer: this is the ledger's own time.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	l.deciding.RLock()
	defer l.deciding.RUnlock()
	policy := l.policy.Load()
	var events []Event
	s, err := l.store.Advance(ctx, ref, func(r Record) (s State, _ []Event, err error) {
		if known.Head == r.State.Head && known.LastConfirmed.After(r.State.LastConfirmed) {
			r.State.LastConfirmed = known.LastConfirmed // not written down yet
		}
		if s, events, err = next(policy, r); err != nil {
			return s, nil, err
		}
		Identify(&s, events)
		for i := range events {
			events[i].Recipients = l.notify(events[i])
		}
		return s, events, nil
	})
	if err != nil {
		return State{}, policy, err
	}
	l.unwritable.Store(nil)
	for i, e := range events {
		l.recorded(s.Index-int64(len(events)-1-i), e)
	}
	return s, policy, nil
}

// append records an event that is about no single ref.
func (l *Ledger) append(ctx context.Context, e Event) error {
	e = l.stamp(e)
	return l.commit(ctx, e, func(ctx context.Context) (int64, error) { return l.store.Append(ctx, e) })
}

// Undelivered records that a sink never took a message.
func (l *Ledger) Undelivered(ctx context.Context, u Undelivered) error {
	return l.append(ctx, Event{Type: DeadLetter, Dead: &u})
}

// stamp gives an event of our own making its identity, its time and the policy.
func (l *Ledger) stamp(e Event) Event {
	e.ID, e.Time = newID(), l.now().UTC().Truncate(time.Millisecond)
	e.Policy = Effect{SHA256: l.policy.Load().SHA256()}
	e.Recipients = l.notify(e)
	return e
}

// commit has an event of our own making written down. What it is about may be
// fs.ErrNotExist; otherwise an error is the ledger's.
func (l *Ledger) commit(ctx context.Context, e Event, write func(context.Context) (int64, error)) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	index, err := write(ctx)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return err
	case err != nil:
		l.unwritable.Store(&err)
		return fmt.Errorf("record %s: %w: %w", e.Type, ErrLedger, err)
	}
	l.unwritable.Store(nil)
	l.recorded(index, e)
	return nil
}
