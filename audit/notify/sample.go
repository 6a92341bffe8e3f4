package notify

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"

	"tidemark/audit"
)

// samples are events that a sink can be tried with, by name.
var samples = map[string]func(now time.Time) []audit.Event{
	"kics": kics,
	"move": func(now time.Time) []audit.Event { return kics(now)[:1] },
}

// kics are the events of an incident: on 2026-04-22 somebody with a publisher's
// credentials overwrote five tags of checkmarx/kics within minutes (AUDIT.md, A2). The
// digests are made up but for the first letters of the malicious one.
func kics(now time.Time) []audit.Event {
	bad := digest.Digest("sha256:2588a44890263a81" + strings.Repeat("0", 48))
	before := now.Add(-10 * time.Minute)
	var out []audit.Event
	for n, tag := range []string{"latest", "v2.1.20", "v2.1.20-debian", "alpine", "debian"} {
		old := digest.FromString("sample " + tag)
		e := audit.Event{
			Type: audit.Violation, Time: now, Ref: audit.Ref{Upstream: "docker.io", Repository: "checkmarx/kics", Tag: tag},
			Old: &audit.Content{Digest: old}, New: &audit.Content{Digest: bad}, Interval: &audit.Interval{NotBefore: &before, NotAfter: now},
			Signals: []string{"entrypoint_changed", "revision_missing"}, Reason: "immutable",
			Policy: audit.Effect{Rule: "sample", Mode: audit.Immutable, Effect: "serving-old", Served: old},
		}
		if n == 0 {
			e.Type, e.Class, e.Reason, e.Policy.Mode, e.Policy.Effect, e.Policy.Served = audit.Moved, audit.ClassUnknown, "", audit.Alert, "serving-new", bad
		}
		out = append(out, e)
	}
	return out
}

// Samples are the names of what a sink can be tried with.
func (d *Dispatcher) Samples() []string { return slices.Sorted(maps.Keys(samples)) }

// Test sends a sample to a sink at once, past the outbox, as a message of its own, and
// tells how many events it was. Its title says that it is a test.
func (d *Dispatcher) Test(ctx context.Context, sink, sample string) (int, error) {
	i := slices.IndexFunc(d.o.Routes, func(r Route) bool { return r.Name == sink })
	events := samples[sample]
	if i < 0 || events == nil {
		return 0, fmt.Errorf("there is no sink %q, or no sample %q", sink, sample)
	}
	m, err := sampleMessage(events(time.Now().UTC().Truncate(time.Millisecond)))
	if err != nil {
		return 0, err
	}
	m.ID, m.Origin, m.Test = "test-"+uuid.NewString()+"."+sink, d.o.Origin, true
	if m, err = d.o.Routes[i].Templates.apply(m); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, SendTimeout)
	defer cancel()
	return len(m.Items), d.o.Routes[i].Sink.Send(ctx, m)
}

// sampleMessage is a message about events that never happened.
func sampleMessage(events []audit.Event) (m Message, err error) {
	for _, e := range events {
		e.ID = uuid.New()
		leaf, err := e.Leaf()
		if err != nil {
			return m, err
		}
		m.Items = append(m.Items, Item{Index: -1, Leaf: leaf, Event: e, Clients: -1})
	}
	return m, nil
}

// Preview is what a sink would be told of events, a sample or entries of the log. It
// sends nothing.
func (d *Dispatcher) Preview(sink, sample string, entries []audit.Entry) (title, text string, err error) {
	i := slices.IndexFunc(d.o.Routes, func(r Route) bool { return r.Name == sink })
	events := samples[sample]
	if i < 0 || events == nil && len(entries) == 0 {
		return "", "", fmt.Errorf("there is no sink %q, or no sample %q", sink, sample)
	}
	var m Message
	if len(entries) == 0 {
		if m, err = sampleMessage(events(time.Now().UTC().Truncate(time.Millisecond))); err != nil {
			return "", "", err
		}
	}
	for _, entry := range entries {
		e, err := audit.ParseLeaf(entry.Leaf)
		if err != nil {
			return "", "", fmt.Errorf("entry %d: %w", entry.Index, err)
		}
		m.Items = append(m.Items, Item{Index: entry.Index, Leaf: entry.Leaf, Event: e, Clients: -1})
	}
	if m, err = d.o.Routes[i].Templates.apply(m); err != nil {
		return "", "", fmt.Errorf("the template: %w", err)
	}
	return m.Title(), m.Text(), nil
}

// Sinks are the names of those that are told.
func (d *Dispatcher) Sinks() []string {
	names := []string{}
	for _, r := range d.o.Routes {
		names = append(names, r.Name)
	}
	return names
}

// Wants tells whether a sink is told of an event at all.
func (d *Dispatcher) Wants(sink string, e audit.Event) bool {
	return slices.ContainsFunc(d.Recipients(e), func(r audit.Recipient) bool { return r.Sink == sink })
}
