package notify

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
)

// A CloudEvent is an item as CloudEvents 1.0 has it, in structured mode. Its data is
// the leaf, byte for byte.
type CloudEvent struct {
	SpecVersion     string          `json:"specversion"`
	ID              string          `json:"id"`
	Source          string          `json:"source"`
	Type            string          `json:"type"`
	Subject         string          `json:"subject,omitempty"`
	Time            time.Time       `json:"time"`
	DataContentType string          `json:"datacontenttype"`
	Sequence        string          `json:"sequence"`
	SeverityText    string          `json:"severitytext"`
	DataRef         string          `json:"dataref,omitempty"` // where the data is, on the admin address, instead of Data
	Data            json.RawMessage `json:"data,omitempty"`
}

// Referred is the event with a reference to its data (CloudEvents, "Dataref"), for
// messages that would be too large with it.
func (c CloudEvent) Referred() CloudEvent {
	c.DataRef, c.Data = "/api/v1/events/"+c.Sequence, nil
	return c
}

// CloudEvent is the item in the envelope of CloudEvents.
func (i Item) CloudEvent(origin string) CloudEvent {
	c := CloudEvent{
		SpecVersion: "1.0", ID: i.Event.ID.String(), Source: origin, Type: "dev.tidemark." + string(i.Event.Type) + ".v1", Time: i.Event.Time,
		DataContentType: "application/json", Sequence: fmt.Sprint(i.Index), SeverityText: strings.ToUpper(i.Event.Severity().String()), Data: i.Leaf,
	}
	if i.Event.Ref != (audit.Ref{}) {
		c.Subject = i.Event.Ref.String()
	}
	return c
}

// Title is the message in one line.
func (m Message) Title() string {
	if m.title != "" {
		return m.title
	}
	return m.builtinTitle()
}

// Text is the message in full, as plain text.
func (m Message) Text() string {
	if m.text != "" {
		return m.text
	}
	return m.builtinText()
}

func (m Message) builtinTitle() string {
	title := ""
	switch first := m.Items[0]; {
	case m.Digest:
		title = fmt.Sprintf("tidemark: daily digest, %d %s", len(m.Items), plural(len(m.Items), "event"))
	case len(m.Items) > 1:
		title = fmt.Sprintf("[%s] %d events about %s/%s", m.Severity(), len(m.Items), first.Event.Ref.Upstream, first.Event.Ref.Repository)
	default:
		title = fmt.Sprintf("[%s] %s", m.Severity(), first.headline())
	}
	if m.Reminder > 0 {
		title += ", still open"
	}
	if m.Test {
		title = "TEST " + title
	}
	return title
}

func (m Message) builtinText() string {
	var b strings.Builder
	if m.Test {
		b.WriteString("This is a test: none of it happened.\n\n")
	}
	if m.Reminder > 0 {
		fmt.Fprintf(&b, "Told %d %s before. tidemark notify ack INDEX ends the reminders.\n\n", m.Reminder, plural(m.Reminder, "time"))
	}
	for n, i := range m.Items {
		if n > 0 {
			b.WriteString("\n")
		}
		if m.Digest {
			fmt.Fprintf(&b, "%s  %s\n", i.Event.Time.Format("15:04"), i.headline())
			continue
		}
		i.write(&b)
	}
	return strings.TrimRight(b.String(), "\n")
}

// what says of the types what happened, as a verb.
var what = map[audit.Type]string{
	audit.FirstSeen: "was seen for the first time", audit.Moved: "moved", audit.Reverted: "moved back", audit.Repackaged: "was packaged anew",
	audit.Restored: "is there again", audit.Deleted: "was deleted upstream", audit.Held: "moved, and is held", audit.Released: "is released",
	audit.Rejected: "was rejected", audit.Withdrawn: "was taken back by upstream", audit.Violation: "moved, against the policy",
	audit.Starved: "has been behind for too long", audit.Flapping: "goes back and forth", audit.Inconsistent: "is contradicted by its upstream",
	audit.Burst: "moved with others of its repository that do not usually", audit.Aliased: "means the same as other versions",
	audit.Downgraded: "has lost its signature or provenance", audit.TrustChanged: "is signed by others",
}

func (i Item) headline() string {
	e := i.Event
	if e.Ref == (audit.Ref{}) {
		return i.aboutNoTag()
	}
	s := e.Ref.String() + " " + what[e.Type]
	if e.Type == audit.Flapping && e.Flap != nil && e.Flap.State == "closed" {
		s = e.Ref.String() + " has settled"
	}
	if e.Old != nil && e.New != nil && e.Old.Digest != e.New.Digest {
		s += fmt.Sprintf(": %s -> %s", short(e.Old.Digest), short(e.New.Digest))
	}
	if e.Class != "" {
		s += " (" + string(e.Class) + ")"
	}
	return s
}

func (i Item) aboutNoTag() string {
	e := i.Event
	switch {
	case e.Dead != nil:
		return fmt.Sprintf("the sink %s did not take %d %s: %s", e.Dead.Sink, len(e.Dead.Entries), plural(len(e.Dead.Entries), "event"), e.Dead.Error)
	case e.Exposed != nil:
		return fmt.Sprintf("%s, which is denied now, was got by %d %s, last at %s: tidemark exposure %s",
			short(e.New.Digest), e.Exposed.Clients, plural(e.Exposed.Clients, "client"), e.Exposed.Last.Format(time.RFC3339), e.New.Digest)
	case e.Condition != nil && e.Type == audit.Recovered:
		return fmt.Sprintf("%s is well again, after %s", e.Condition.Upstream, e.Condition.Until.Sub(e.Condition.Since).Round(time.Second))
	case e.Condition != nil && e.Type == audit.AccessLost:
		return fmt.Sprintf("%s no longer lets us see what it did, since %s: %s", e.Condition.Upstream, e.Condition.Since.Format(time.RFC3339), e.Condition.Cause)
	case e.Condition != nil:
		return fmt.Sprintf("%s is in trouble since %s: %s", e.Condition.Upstream, e.Condition.Since.Format(time.RFC3339), e.Condition.Cause)
	case e.Gap != nil:
		return fmt.Sprintf("nothing was observed from %s to %s: %s", e.Gap.Start.Format(time.RFC3339), e.Gap.End.Format(time.RFC3339), e.Gap.Cause)
	case e.Fork != nil:
		return fmt.Sprintf("the log goes on under a new origin: %s -> %s", e.Fork.OldOrigin, e.Fork.NewOrigin)
	case e.Operator != nil:
		return "operator: " + e.Operator.Action
	}
	return string(e.Type)
}

// write writes everything that somebody wants to know who is woken by it.
func (i Item) write(b *strings.Builder) {
	e := i.Event
	fmt.Fprintf(b, "%s\n", i.headline())
	line := func(name, format string, args ...any) {
		fmt.Fprintf(b, "  %-9s%s\n", name, fmt.Sprintf(format, args...))
	}
	if v := e.Interval; v != nil && v.NotBefore != nil {
		line("when", "between %s and %s", v.NotBefore.Format(time.RFC3339), v.NotAfter.Format(time.RFC3339))
	} else {
		line("when", "%s", e.Time.Format(time.RFC3339))
	}
	if e.Old != nil {
		line("old", "%s", e.Old.Digest)
	}
	if e.New != nil {
		line("new", "%s", e.New.Digest)
	}
	if len(e.Signals) > 0 {
		line("signals", "%s", strings.Join(e.Signals, ", "))
	}
	if len(e.Tags) > 0 {
		line("tags", "%s", strings.Join(e.Tags, ", "))
	}
	if e.Reason != "" {
		line("reason", "%s", e.Reason)
	}
	if e.Policy.Served != "" {
		rule := e.Policy.Rule
		if rule == "" {
			rule = string(e.Policy.Mode)
		}
		line("served", "%s (rule %q)", short(e.Policy.Served), rule)
	}
	if i.Clients >= 0 {
		line("clients", "%d had the old one: tidemark exposure %s", i.Clients, e.Old.Digest)
	}
	if (e.Type == audit.Held || e.Type == audit.Violation) && e.New != nil {
		if e.Policy.Until != nil {
			line("until", "%s, if nothing happens", e.Policy.Until.Format(time.RFC3339))
		}
		line("approve", "tidemark approve %s %s --reason ...", e.Ref, e.New.Digest)
	}
	if e.Old != nil && e.New != nil {
		line("diff", "tidemark diff %s %s", e.Old.Digest, e.New.Digest)
	}
	if i.Index >= 0 { // a sample is in no log
		line("proof", "tidemark show %d; /log/proof/%d", i.Index, i.Index)
	}
}

func short(d digest.Digest) string {
	if hex := d.Encoded(); len(hex) > 12 {
		return hex[:12]
	}
	return d.String()
}

func plural(n int, noun string) string {
	if n == 1 {
		return noun
	}
	return noun + "s"
}
