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

// names are of alerts that last: what is held is resolved by its release, what was
// deleted by its return.
var names = map[audit.Type]string{
	audit.Held: "TidemarkHeld", audit.Released: "TidemarkHeld", audit.Rejected: "TidemarkHeld", audit.Withdrawn: "TidemarkHeld",
	audit.Deleted: "TidemarkDeleted", audit.Restored: "TidemarkDeleted",
	audit.Violation: "TidemarkViolation",
}

var ends = map[audit.Type]bool{audit.Released: true, audit.Rejected: true, audit.Withdrawn: true, audit.Restored: true}

// alertOf is an item as an alert. Its labels are its identity: none of them may differ
// between what begins and what ends it.
func alertOf(i notify.Item) alert {
	e := i.Event
	one := notify.Message{Items: []notify.Item{i}}
	a := alert{
		Labels:      map[string]string{"alertname": names[e.Type], "job": "tidemark"},
		Annotations: map[string]string{"summary": one.Title(), "description": one.Text(), "event": e.ID.String(), "severity": e.Severity().String()},
		StartsAt:    e.Time, EndsAt: e.Time.Add(lasting),
	}
	if e.Ref != (audit.Ref{}) {
		a.Labels["upstream"], a.Labels["repository"], a.Labels["tag"] = e.Ref.Upstream, e.Ref.Repository, e.Ref.Tag
	}
	switch {
	case a.Labels["alertname"] == "":
		a.Labels["alertname"], a.Labels["type"], a.EndsAt = "TidemarkEvent", string(e.Type), e.Time.Add(moment)
		if e.New != nil {
			a.Labels["digest"] = e.New.Digest.String()
		}
	case ends[e.Type]:
		a.EndsAt = e.Time
	}
	if a.Labels["alertname"] == "TidemarkViolation" {
		a.Labels["severity"] = "critical"
	} else if a.Labels["alertname"] != "TidemarkEvent" {
		a.Labels["severity"] = "warning"
	} else {
		a.Labels["severity"] = e.Severity().String()
	}
	return a
}

// Send implements notify.Sink.
func (s *Sink) Send(ctx context.Context, m notify.Message) error {
	var alerts []alert
	for _, i := range m.Items {
		alerts = append(alerts, alertOf(i))
	}
	body, err := json.Marshal(alerts)
	if err != nil {
		return err
	}
	return s.post.Post(ctx, http.Header{"Content-Type": {"application/json"}}, body)
}
