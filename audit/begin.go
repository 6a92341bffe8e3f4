package audit

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// What a ledger remembers from one process to the next.
const (
	memoryPolicy     = "policy"     // its sha256
	memoryIdentities = "identities" // of each upstream, as JSON
	memoryDenied     = "denied"     // the digests that were, as JSON
	memoryAlive      = "alive"      // when the ledger was last awake, RFC 3339
)

// aliveEvery is how often that is written down: a gap is many times longer.
const aliveEvery = time.Minute

// Begin records what changed while no process was there: the policy, the
// credentials of upstreams, and that nothing was observed meanwhile. It is called
// once before the first Resolve, on a ledger with a Memory. identities says as whom each upstream is asked.
func (l *Ledger) Begin(ctx context.Context, identities map[string]string) error {
	if err := l.beginPolicy(ctx); err != nil {
		return err
	}
	if err := l.identify(ctx, identities); err != nil {
		return err
	}
	if err := l.tellExposed(ctx); err != nil {
		return err
	}
	last, err := l.memory.Recall(ctx, memoryAlive)
	if err != nil {
		return fmt.Errorf("read the ledger: %w", err)
	}
	if at, err := time.Parse(time.RFC3339, last); err == nil && l.now().Sub(at) > l.Policy().GapAfter() {
		gap := &Blind{Start: at.UTC(), End: l.now().UTC().Truncate(time.Millisecond), Cause: "stopped"}
		if err := l.append(ctx, Event{Type: Gap, Gap: gap}); err != nil {
			return err
		}
	}
	l.note(ctx)
	return nil
}

// beginPolicy records that the policy is another than the process before had.
// The first one is a baseline.
func (l *Ledger) beginPolicy(ctx context.Context) error {
	old, err := l.memory.Recall(ctx, memoryPolicy)
	if err != nil {
		return fmt.Errorf("read the ledger: %w", err)
	}
	now := l.Policy().SHA256()
	if old == now {
		return nil
	}
	if old != "" {
		op := &Operator{Action: "policy.changed", Reason: "the configuration at the start", Old: old, New: now}
		if err := l.append(ctx, Event{Type: Action, Operator: op}); err != nil {
			return err
		}
	}
	return l.memory.Remember(ctx, memoryPolicy, now)
}

// Policy is what decides at present.
func (l *Ledger) Policy() *Policy { return l.policy.Load() }

// SetPolicy has p decide from here on. That it changed is recorded first; what is
// recorded after that was decided by p.
func (l *Ledger) SetPolicy(ctx context.Context, p *Policy, reason string) error {
	l.deciding.Lock()
	defer l.deciding.Unlock()
	if old := l.policy.Load(); old.SHA256() != p.SHA256() {
		op := &Operator{Action: "policy.changed", Reason: reason, Old: old.SHA256(), New: p.SHA256()}
		if err := l.append(ctx, Event{Type: Action, Operator: op}); err != nil {
			return err
		}
	}
	l.policy.Store(p)
	l.mu.Lock()
	l.epoch++
	l.recent.Purge()
	l.mu.Unlock()
	return nil
}

// Reload has p decide from here on. What changed is recorded first; an error of
// the policy leaves everything as it was.
func (l *Ledger) Reload(ctx context.Context, p *Policy, identities map[string]string, reason string) error {
	if err := l.SetPolicy(ctx, p, reason); err != nil {
		return err
	}
	if err := l.memory.Remember(ctx, memoryPolicy, p.SHA256()); err != nil {
		// It decides already, and is on the record.
		l.log.Warn().Err(err).Msg("the policy could not be remembered; the next start will record it again")
	}
	if err := l.tellExposed(ctx); err != nil {
		return err
	}
	return l.identify(ctx, identities)
}

// tellExposed tells, once for each digest that is denied, who got it before.
func (l *Ledger) tellExposed(ctx context.Context) error {
	if l.exposed == nil {
		return nil
	}
	text, err := l.memory.Recall(ctx, memoryDenied)
	if err != nil {
		return fmt.Errorf("read the ledger: %w", err)
	}
	var told []digest.Digest
	if text != "" {
		if err := json.Unmarshal([]byte(text), &told); err != nil {
			return fmt.Errorf("read the ledger: remembered denials: %w", err)
		}
	}
	denied := l.Policy().Denied()
	if slices.Equal(told, denied) {
		return nil
	}
	for _, d := range denied {
		if slices.Contains(told, d) {
			continue
		}
		x, err := l.exposed(ctx, d)
		if err != nil {
			return fmt.Errorf("who got %s: %w", d, err)
		}
		if x.Clients == 0 {
			continue
		}
		if err := l.append(ctx, Event{Type: ExposureFound, New: &Content{Digest: d}, Exposed: &x}); err != nil {
			return err
		}
	}
	now, err := json.Marshal(denied)
	if err != nil {
		panic("audit: denials cannot be encoded: " + err.Error())
	}
	return l.memory.Remember(ctx, memoryDenied, string(now))
}

// identify records of which upstreams the credentials are others than they
// were: what they show from here on may be something else (R16).
func (l *Ledger) identify(ctx context.Context, identities map[string]string) error {
	text, err := l.memory.Recall(ctx, memoryIdentities)
	if err != nil {
		return fmt.Errorf("read the ledger: %w", err)
	}
	var old map[string]string
	if text != "" {
		if err := json.Unmarshal([]byte(text), &old); err != nil {
			return fmt.Errorf("read the ledger: remembered identities: %w", err)
		}
	}
	changed := false
	for _, name := range sortedKeys(identities) {
		was, known := old[name]
		if was == identities[name] {
			continue
		}
		changed = true
		if !known {
			continue
		}
		op := &Operator{Action: "credentials.changed", Target: name, Old: was, New: identities[name]}
		if err := l.append(ctx, Event{Type: Action, Operator: op}); err != nil {
			return err
		}
	}
	if !changed {
		return nil
	}
	now, err := json.Marshal(identities)
	if err != nil {
		panic("audit: identities cannot be encoded: " + err.Error())
	}
	return l.memory.Remember(ctx, memoryIdentities, string(now))
}
