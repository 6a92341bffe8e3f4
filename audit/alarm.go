package audit

import (
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// The rules that keep alarms from being false. They are about whether people
// are told, and about what a cooldown may serve; each change is on the record.

const (
	settleAfter = 30 * time.Second // a second answer this much later confirms a move (R3)
	edgeLocal   = 15 * time.Minute // one that a single edge gives waits this long (R13)
	calmAfter   = time.Hour        // a ref that did not change for this long has stopped flapping (R4)
	flapChanges = 3                // among two digests within the window are flapping
	flapsMost   = 8                // changes that are remembered
)

// settle tells whether the last move has been confirmed as alerts want it.
func (t *turn) settle() {
	m := t.s.Move
	if m == nil {
		return
	}
	age := t.now.Sub(m.At)
	if m.Settled {
		if age > assembly {
			t.s.Move = nil
		}
		return
	}
	wait := settleAfter
	if t.p != nil && slices.Contains(t.p.text.Mirrors, t.ref.Upstream) {
		wait = t.p.flapWindow(t.ref) // a mirror's stale answers last as long as its own cache (R15)
	}
	other := m.Edge == "" || t.seen.Evidence.Edge != m.Edge
	if age >= wait && (other || age >= edgeLocal) {
		settled := *m
		settled.Settled = true
		t.s.Move = &settled
	}
}

func (s State) flapping() bool { return s.Flap != nil && !s.Flap.Since.IsZero() }

// flap counts a change of the head, which was before.
func (t *turn) flap(before digest.Digest) {
	f := Flap{}
	if t.s.Flap != nil {
		f = *t.s.Flap
	}
	window := t.p.flapWindow(t.ref)
	f.Recent = slices.DeleteFunc(slices.Clone(f.Recent), func(c Change) bool { return t.now.Sub(c.At) > window })
	f.Recent = append(f.Recent, Change{t.now, t.s.Head})
	f.Recent = f.Recent[max(0, len(f.Recent)-flapsMost):]
	if f.Since.IsZero() {
		if digests := f.digests(before); len(f.Recent) >= flapChanges && len(digests) <= 2 {
			f.Since, f.Count = f.Recent[0].At, len(f.Recent)
			t.event(Event{Type: Flapping, Flap: &FlapCount{State: "open", Since: f.Since, Changes: f.Count, Digests: digests}})
		}
	} else {
		f.Count++
	}
	t.s.Flap = &f
}

func (f Flap) digests(before digest.Digest) []digest.Digest {
	out := []digest.Digest{before}
	for _, c := range f.Recent {
		if !slices.Contains(out, c.Digest) {
			out = append(out, c.Digest)
		}
	}
	return out
}

// calm ends a flap that has ended.
func (t *turn) calm() {
	f := t.s.Flap
	if f == nil {
		return
	}
	quiet := t.now.Sub(f.Recent[len(f.Recent)-1].At)
	switch {
	case !f.Since.IsZero() && quiet >= calmAfter:
		t.event(Event{Type: Flapping, Flap: &FlapCount{State: "closed", Since: f.Since, Changes: f.Count, Digests: f.digests(t.s.Head)}})
		t.s.Flap = nil
	case f.Since.IsZero() && quiet > t.p.flapWindow(t.ref):
		t.s.Flap = nil
	}
}
