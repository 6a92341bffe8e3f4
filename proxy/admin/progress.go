package admin

import (
	"encoding/json"
	"net/http"
	"sync"
)

// progress makes a handler of a long call that tells how far it is: one JSON object
// a line (NDJSON), the last of which is what came of it or, under error, why nothing
// did. An error before there was anything to tell is an error like any other.
func progress(f func(r *http.Request, tell func(any)) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !isContent(r, "application/json") {
			writeError(w, errNotJSON)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		lines := &lines{w: w}
		end, err := f(r, lines.tell)
		switch {
		case err != nil && !lines.begun:
			writeError(w, err)
		case err != nil:
			lines.tell(refused{asError(err)})
		default:
			lines.tell(end)
		}
	}
}

// lines are an answer line by line. A client that is gone needs none.
type lines struct {
	mu    sync.Mutex
	w     http.ResponseWriter
	begun bool
}

func (l *lines) tell(v any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.begun {
		l.begun = true
		l.w.Header().Set("Content-Type", "application/x-ndjson")
	}
	enc := json.NewEncoder(l.w)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err == nil {
		_ = http.NewResponseController(l.w).Flush()
	}
}
