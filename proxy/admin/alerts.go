package admin

import (
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
)

// An Alert is an event that stays open until another ends it.
type Alert struct {
	Index        int64         `json:"index"` // of the entry that opened it
	Ref          string        `json:"ref"`
	Type         audit.Type    `json:"type"`
	Digest       digest.Digest `json:"digest,omitempty"`
	Opened       time.Time     `json:"opened"`
	Acknowledged *time.Time    `json:"acknowledged,omitempty"`
	Resolved     *time.Time    `json:"resolved,omitempty"`
	ResolvedBy   audit.Type    `json:"resolved_by,omitempty"`
}

func alertOf(a audit.StatefulAlert) Alert {
	return Alert{a.Index, a.Ref.String(), a.Type, a.Digest, a.Opened, a.Acknowledged, a.Resolved, a.ResolvedBy}
}

// Alerts are those that are open, newest first, or all.
type Alerts struct {
	Alerts []Alert `json:"alerts"`
}

// alertsMost bounds the alerts of an answer.
const alertsMost = 1000

func (h *Handler) alerts(r *http.Request) (any, error) {
	all := false
	switch s := r.URL.Query().Get("all"); s {
	case "", "false":
	case "true":
		all = true
	default:
		return nil, badRequest("all is %.100q, want true or false", s)
	}
	list, err := h.o.Alerts.Alerts(r.Context(), all, alertsMost)
	if err != nil {
		return nil, err
	}
	out := Alerts{[]Alert{}}
	for _, a := range list {
		out.Alerts = append(out.Alerts, alertOf(a))
	}
	return out, nil
}

// An Acknowledgement says that somebody knows of an alert.
type Acknowledgement struct {
	Index  *int64 `json:"index"`
	Reason string `json:"reason"`
}

func (h *Handler) acknowledge(r *http.Request) (any, error) {
	var in Acknowledgement
	if err := body(r, &in); err != nil {
		return nil, err
	}
	if in.Index == nil {
		return nil, badRequest("index is missing: of the entry that opened the alert, as GET /api/v1/alerts has it")
	}
	a, err := h.o.Ledger.Acknowledge(r.Context(), h.o.Alerts, *in.Index, in.Reason)
	if errors.Is(err, audit.ErrNoAlert) {
		return nil, &Error{http.StatusNotFound, "not_found", err.Error()}
	}
	return alertOf(a), err
}

// A Mute has nobody told of the refs of a pattern until a time.
type Mute struct {
	Match  string    `json:"match"`
	Until  time.Time `json:"until"`
	Reason string    `json:"reason"`
}

// Mutes are those that are in force.
type Mutes struct {
	Mutes []Mute `json:"mutes"`
}

func (h *Handler) mutes(r *http.Request) (any, error) {
	list, err := h.o.Alerts.Mutes(r.Context(), time.Now())
	if err != nil {
		return nil, err
	}
	out := Mutes{[]Mute{}}
	for _, m := range list {
		out.Mutes = append(out.Mutes, Mute{m.Match.String(), m.Until, m.Reason})
	}
	return out, nil
}

func (h *Handler) mute(r *http.Request) (any, error) {
	var in Mute
	if err := body(r, &in); err != nil {
		return nil, err
	}
	g, err := globOf(in.Match)
	if err != nil {
		return nil, err
	}
	if !in.Until.After(time.Now()) {
		return nil, badRequest("until is %s, which is not a time to come", in.Until.Format(time.RFC3339))
	}
	return in, h.o.Ledger.Mute(r.Context(), audit.Mute{Match: g, Until: in.Until, Reason: in.Reason})
}

func globOf(pattern string) (audit.Glob, error) {
	g, err := audit.ParseGlob(pattern)
	if err != nil {
		return g, badRequest("match: %v", err)
	}
	if !g.Possible() {
		return g, badRequest("match: %q stands for no tag: want upstream/repository:tag in full, such as docker.io/library/nginx:*", pattern)
	}
	return g, nil
}

// An Unmute takes a mute back.
type Unmute struct {
	Match string `json:"match"`
}

func (h *Handler) unmute(r *http.Request) (any, error) {
	var in Unmute
	if err := body(r, &in); err != nil {
		return nil, err
	}
	list, err := h.o.Alerts.Mutes(r.Context(), time.Now())
	if err != nil {
		return nil, err
	}
	for _, m := range list {
		if m.Match.String() == in.Match {
			return in, h.o.Ledger.Mute(r.Context(), audit.Mute{Match: m.Match})
		}
	}
	return nil, &Error{http.StatusNotFound, "not_found", fmt.Sprintf("nothing is muted by %.200q", in.Match)}
}
