package admin

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"tidemark/audit"
)

// A Notifier tells others of events.
type Notifier interface {
	Sinks() []string

	// Test sends a sample, one of Samples, to a sink at once, and tells how many events
	// it was.
	Test(ctx context.Context, sink, sample string) (events int, err error)
	Samples() []string

	// Preview is what a sink would be told of a sample, or of entries of the log.
	Preview(sink, sample string, entries []audit.Entry) (title, text string, err error)

	// Wants tells whether a sink is told of an event.
	Wants(sink string, e audit.Event) bool

	// Grown tells that there may be letters.
	Grown()
}

// A NotifyTest asks to send a sample to a sink.
type NotifyTest struct {
	Sink   string `json:"sink"`
	Sample string `json:"sample"` // kics or move; "" is kics
}

// A NotifyReplay asks to tell a sink again of what was recorded since a time.
type NotifyReplay struct {
	Sink  string     `json:"sink"`
	Since *time.Time `json:"since"`
}

// A NotifyResult is what was sent, or will be.
type NotifyResult struct {
	Sink   string `json:"sink"`
	Events int    `json:"events"`
}

// A NotifyPreview asks what a sink would be told: of a sample, or of an entry of the log.
type NotifyPreview struct {
	Sink   string `json:"sink"`
	Sample string `json:"sample"`
	Index  *int64 `json:"index"`
}

// A NotifyText is what a message says.
type NotifyText struct {
	Title string `json:"title"`
	Text  string `json:"text"`
}

func (h *Handler) notifyPreview(r *http.Request) (any, error) {
	var in NotifyPreview
	if err := body(r, &in); err != nil {
		return nil, err
	}
	if err := h.sink(in.Sink); err != nil {
		return nil, err
	}
	var entries []audit.Entry
	if in.Index != nil {
		e, err := h.entry(r.Context(), *in.Index)
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
	} else {
		if in.Sample == "" {
			in.Sample = "kics"
		}
		if samples := h.o.Notifier.Samples(); !slices.Contains(samples, in.Sample) {
			return nil, badRequest("sample %.100q is not one of %s", in.Sample, strings.Join(samples, ", "))
		}
	}
	title, text, err := h.o.Notifier.Preview(in.Sink, in.Sample, entries)
	if err != nil {
		return nil, &Error{http.StatusConflict, "template", err.Error()}
	}
	return NotifyText{title, text}, nil
}

func (h *Handler) sink(name string) error {
	sinks := h.o.Notifier.Sinks()
	switch {
	case len(sinks) == 0:
		return &Error{http.StatusNotFound, "not_found", "nobody is told of anything: the configuration has no notify"}
	case !slices.Contains(sinks, name):
		return &Error{http.StatusNotFound, "not_found", fmt.Sprintf("there is no sink %.100q; there are: %s", name, strings.Join(sinks, ", "))}
	}
	return nil
}

func (h *Handler) notifyTest(r *http.Request) (any, error) {
	var in NotifyTest
	if err := body(r, &in); err != nil {
		return nil, err
	}
	if err := h.sink(in.Sink); err != nil {
		return nil, err
	}
	if in.Sample == "" {
		in.Sample = "kics"
	}
	if samples := h.o.Notifier.Samples(); !slices.Contains(samples, in.Sample) {
		return nil, badRequest("sample %.100q is not one of %s", in.Sample, strings.Join(samples, ", "))
	}
	n, err := h.o.Notifier.Test(r.Context(), in.Sink, in.Sample)
	if err != nil {
		return nil, &Error{http.StatusBadGateway, "not_taken", fmt.Sprintf("%s did not take it: %v", in.Sink, err)}
	}
	return NotifyResult{in.Sink, n}, nil
}

// replayMost bounds what a sink is told again in one go.
const replayMost = 10_000

func (h *Handler) notifyReplay(r *http.Request) (any, error) {
	var in NotifyReplay
	if err := body(r, &in); err != nil {
		return nil, err
	}
	if err := h.sink(in.Sink); err != nil {
		return nil, err
	}
	if in.Since == nil {
		return nil, badRequest("since is missing: tell again of what was recorded since when?")
	}
	var indexes []int64
	for e, err := range h.eachEntry(r.Context()) {
		if err != nil {
			return nil, err
		}
		ev, err := audit.ParseLeaf(e.Leaf)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", e.Index, err)
		}
		if !ev.Time.Before(*in.Since) && h.o.Notifier.Wants(in.Sink, ev) {
			indexes = append(indexes, e.Index)
		}
	}
	if len(indexes) > replayMost {
		return nil, badRequest("these are %d events, more than the %d that are told again at once: take a later time", len(indexes), replayMost)
	}
	if err := h.o.Requeue(r.Context(), in.Sink, indexes, time.Now()); err != nil {
		return nil, err
	}
	h.o.Notifier.Grown()
	return NotifyResult{in.Sink, len(indexes)}, nil
}
