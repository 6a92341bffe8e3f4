// Package alertmanager posts alerts to Prometheus' Alertmanager (API v2,
// POST /api/v2/alerts).
package alertmanager

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"tidemark/audit"
	"tidemark/audit/notify"
)

// A Sink is an Alertmanager.
type Sink struct{ post *notify.Poster }

// New returns the sink at an address, that of the Alertmanager itself.
func New(address string) (*Sink, error) {
	post, err := notify.NewPoster(strings.TrimSuffix(address, "/") + "/api/v2/alerts")
	return &Sink{post}, err
}

// An alert that lasts is firing until it is resolved, or for a week: it is not sent
// again. One that is about a moment is firing for an hour.
const (
	lasting = 7 * 24 * time.Hour
	moment  = time.Hour
)

type alert struct {
	Labels      map[string]string `json:"labels"`
	Annotations map[string]string `json:"annotations"`
	StartsAt    time.Time         `json:"startsAt"`
	EndsAt      time.Time         `json:"endsAt"`
}

// names are of alerts that last, by the type of the event that opens them.
var names = map[audit.Type]string{
	audit.Held: "TidemarkHeld", audit.Violation: "TidemarkViolation", audit.Downgraded: "TidemarkTrustDowngraded",
	audit.TrustChanged: "TidemarkTrustChanged", audit.Deleted: "TidemarkDeleted", audit.Starved: "TidemarkStarved",
}

// alertsOf are what an item is to an Alertmanager: what it ends, what it opens, or else a
// moment.
func alertsOf(i notify.Item) (out []alert) {
	e := i.Event
	one := notify.Message{Items: []notify.Item{i}}
	as := func(name string, severity audit.Severity, until time.Time) *alert {
		a := alert{
			Labels:      map[string]string{"alertname": name, "job": "tidemark", "severity": severity.String()},
			Annotations: map[string]string{"summary": one.Title(), "description": one.Text(), "event": e.ID.String(), "severity": e.Severity().String()},
			StartsAt:    e.Time, EndsAt: until,
		}
		if e.Ref != (audit.Ref{}) {
			a.Labels["upstream"], a.Labels["repository"], a.Labels["tag"] = e.Ref.Upstream, e.Ref.Repository, e.Ref.Tag
		}
		out = append(out, a)
		return &out[len(out)-1]
	}
	// Labels are an alert's identity: none may differ between what opens and what ends it.
	lasts := func(kind audit.Type, until time.Time) { as(names[kind], audit.Event{Type: kind}.Severity(), until) }
	ended := e.Ends()
	if e.Type == audit.Withdrawn {
		ended = []audit.Type{audit.Held}
	}
	for _, kind := range ended {
		lasts(kind, e.Time)
	}
	switch {
	case e.Opens():
		lasts(e.Type, e.Time.Add(lasting))
	case len(ended) == 0 || e.Type.Moves():
		a := as("TidemarkEvent", e.Severity(), e.Time.Add(moment))
		a.Labels["type"] = string(e.Type)
		if e.New != nil {
			a.Labels["digest"] = e.New.Digest.String()
		}
		if e.Condition != nil {
			a.Labels["upstream"] = e.Condition.Upstream
		}
	}
	return out
}

// Send implements notify.Sink.
func (s *Sink) Send(ctx context.Context, m notify.Message) error {
	var alerts []alert
	for _, i := range m.Items {
		alerts = append(alerts, alertsOf(i)...)
	}
	body, err := json.Marshal(alerts)
	if err != nil {
		return err
	}
	return s.post.Post(ctx, http.Header{"Content-Type": {"application/json"}}, body)
}
