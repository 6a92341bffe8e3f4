package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// A StatefulAlert is an event that stays open until another ends it: something is not as it
// should be, or somebody has to decide.
type StatefulAlert struct {
	Index        int64 // of the event that opened it
	Ref          Ref
	Type         Type
	Digest       digest.Digest // that it is about, "" for none
	Opened       time.Time
	Acknowledged *time.Time // somebody knows: nobody is reminded any more
	Resolved     *time.Time
	ResolvedBy   Type // the event that ended it
}

// Opens tells whether e opens an alert. One that is open already of the same type and
// ref is ended by it.
func (e Event) Opens() bool {
	switch e.Type {
	case Held:
		return e.Operator == nil // whoever held it by hand knows
	case Violation, Downgraded, TrustChanged, Deleted, Starved:
		return e.Ref != (Ref{})
	}
	return false
}

// Ends are the types of alerts about the ref that e ends.
func (e Event) Ends() []Type {
	switch {
	case e.Type == Released && e.Policy.Effect == servingOld:
		return []Type{Starved} // an earlier one is served: the head still waits
	case e.Type == Released, e.Type == Rejected:
		return []Type{Held, Violation, Downgraded, TrustChanged, Starved}
	case e.Type == Restored:
		return []Type{Held, Violation, Downgraded, TrustChanged, Deleted, Starved}
	case e.Type.Moves() && e.Type != FirstSeen && e.New != nil && e.Policy.Served == e.New.Digest:
		return []Type{Held, Violation, Downgraded, TrustChanged, Starved}
	case e.Type.Moves() && e.Type != FirstSeen:
		return []Type{Held, Violation, Downgraded, TrustChanged}
	}
	return nil
}

// A Mute is that nobody is told of some refs until a time.
type Mute struct {
	Match  Glob
	Until  time.Time
	Reason string
}

// Mutes tells whether nobody is to be told of e at a time. What is about no ref is muted
// with everything only.
func (m Mute) Mutes(e Event, now time.Time) bool {
	all := m.Match.String() == "**"
	return now.Before(m.Until) && (all || e.Ref != (Ref{}) && m.Match.Matches(e.Ref))
}

// An AlertStore keeps alerts and mutes, which it derives from the events that it commits.
type AlertStore interface {
	// Alerts returns alerts, newest first: those that are open or, with all, the others,
	// too; at most limit of them.
	Alerts(ctx context.Context, all bool, limit int) ([]StatefulAlert, error)

	// Mutes returns the mutes that are in force at a time, in order of their patterns.
	Mutes(ctx context.Context, now time.Time) ([]Mute, error)
}

// The actions about who is told.
const (
	Acknowledge = "acknowledge"
	MuteAction  = "mute"
	Unmute      = "unmute"
)

// ErrNoAlert reports that there is no open alert under an index.
var ErrNoAlert = errors.New("there is no such alert that is open")

// alertsMost bounds the open alerts that are looked through.
const alertsMost = 100_000

// Acknowledge records that somebody knows of the open alert that an entry of the log
// opened. Without one it is fs.ErrNotExist.
func (l *Ledger) Acknowledge(ctx context.Context, store AlertStore, index int64, reason string) (StatefulAlert, error) {
	if reason != "" && !validReason(reason) {
		return StatefulAlert{}, ErrReason
	}
	open, err := store.Alerts(ctx, false, alertsMost)
	if err != nil {
		return StatefulAlert{}, err
	}
	i := slices.IndexFunc(open, func(a StatefulAlert) bool { return a.Index == index })
	if i < 0 {
		return StatefulAlert{}, fmt.Errorf("entry %d: %w: %w", index, ErrNoAlert, fs.ErrNotExist)
	}
	op := &Operator{Action: Acknowledge, Reason: reason, Target: open[i].Ref.String(), Entry: &index}
	return open[i], l.append(ctx, Event{Type: Action, Operator: op})
}

// Mute records that nobody is told of refs until a time; one of the same pattern is
// replaced. A time that is over takes it back.
func (l *Ledger) Mute(ctx context.Context, m Mute) error {
	op := &Operator{Action: Unmute, Target: m.Match.String(), Reason: m.Reason}
	if m.Until.After(l.now()) {
		until := m.Until.UTC().Truncate(time.Second)
		op.Action, op.Until = MuteAction, &until
		if !validReason(m.Reason) {
			return ErrReason
		}
	}
	return l.append(ctx, Event{Type: Action, Operator: op})
}
