package admin

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"

	"tidemark/audit"
)

// Events wakes those who follow the log. Its zero value is not usable.
type Events struct {
	mu    sync.Mutex
	grown chan struct{} // closed and replaced whenever the log has grown
}

// NewEvents returns events without followers.
func NewEvents() *Events { return &Events{grown: make(chan struct{})} }

// Grown tells that the log has grown. It does not block.
func (e *Events) Grown() {
	e.mu.Lock()
	defer e.mu.Unlock()
	close(e.grown)
	e.grown = make(chan struct{})
}

func (e *Events) next() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.grown
}

const (
	streamPage  = 256
	streamAlive = 15 * time.Second // a comment, so that nobody in between gives up
)

// stream sends events as they are recorded (Server-Sent Events, WHATWG HTML
// 9.2): from the one after Last-Event-ID or ?after on, or from now on.
func (h *Handler) stream(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	for p := range q {
		if p != "ref" && p != "type" && p != "after" {
			writeError(w, badRequest("parameter %.100q is not known; this call takes: ref, type, after", p))
			return
		}
	}
	query, err := eventQuery(q)
	if err != nil {
		writeError(w, err)
		return
	}
	after, err := h.streamFrom(r)
	if err != nil {
		writeError(w, err)
		return
	}
	query.After, query.Limit = &after, streamPage
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-cache")
	w.WriteHeader(http.StatusOK)
	flush := http.NewResponseController(w)
	alive := time.NewTicker(streamAlive)
	defer alive.Stop()
	for {
		grown := h.o.Events.next() // before the look, so that nothing is missed
		sent, err := h.sendEvents(r.Context(), w, &query)
		if err != nil || flush.Flush() != nil {
			return // the client comes back with Last-Event-ID
		}
		if sent == streamPage {
			continue
		}
		select {
		case <-grown:
		case <-alive.C:
			if _, err := fmt.Fprint(w, ": alive\n\n"); err != nil {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}

// streamFrom is the index after which a stream begins.
func (h *Handler) streamFrom(r *http.Request) (int64, error) {
	s := r.Header.Get("Last-Event-ID")
	if s == "" {
		s = r.URL.Query().Get("after")
	}
	if s == "" {
		tree, err := h.o.Entries.Tree(r.Context())
		return tree.N - 1, err
	}
	after, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, badRequest("after %.50q is not an index", s)
	}
	return after, nil
}

// sendEvents sends what there is beyond the query's After, and moves it on.
func (h *Handler) sendEvents(ctx context.Context, w io.Writer, query *audit.EventQuery) (int, error) {
	page, err := h.o.Views.Events(ctx, *query)
	if err != nil {
		return 0, err
	}
	for _, e := range page {
		if _, err := eventOf(e); err != nil {
			return 0, err
		}
		// A leaf is compact JSON: it has no line breaks.
		if _, err := fmt.Fprintf(w, "id: %d\ndata: {\"index\":%d,\"leaf\":%s}\n\n", e.Index, e.Index, e.Leaf); err != nil {
			return 0, err
		}
		query.After = &e.Index
	}
	return len(page), nil
}
