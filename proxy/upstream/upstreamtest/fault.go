package upstreamtest

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
)

// The names of faults.
const (
	Cut      = "cut"      // the connection breaks after At bytes of the content
	Wrong    = "wrong"    // byte At of the content is another one
	Stall    = "stall"    // nothing comes after At bytes of the content, until Release
	Hang     = "hang"     // no answer at all, until Release
	Status   = "status"   // the answer has the status At: 401, 404, 429, 500, …
	Lie      = "lie"      // Docker-Content-Digest names other content
	NoDigest = "nodigest" // Docker-Content-Digest is missing
	NoRange  = "norange"  // a Range is ignored
	NoLength = "nolength" // Content-Length is missing
	Redirect = "redirect" // the content is at another host
	Endless  = "endless"  // the body never ends
	Garbage  = "garbage"  // the body is a page of HTML
	Login    = "login"    // it leads to a page where people log in
)

// A Fault is something that goes wrong with requests.
type Fault struct {
	Name   string
	Method string // "" for any
	Path   string // part of the path; "" for any
	At     int64  // what Name says
	Times  int    // how often it happens; 0 for always
	Header http.Header
}

// Break adds a fault.
func (r *Registry) Break(f Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f.Times == 0 {
		f.Times = -1
	}
	r.faults = append(r.faults, &f)
}

// Mend takes all faults away.
func (r *Registry) Mend() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = nil
}

// Release lets what stalls and hangs go on.
func (r *Registry) Release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.released)
	r.released = make(chan struct{})
}

func (r *Registry) faultFor(q *http.Request) *Fault {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.faults {
		if f.Times != 0 && (f.Method == "" || f.Method == q.Method) && strings.Contains(q.URL.Path, f.Path) &&
			!(f.Name == Redirect && q.Host == hostOf(r.cdn.URL)) && !(f.Name == Login && q.URL.Path == "/login") {
			f.Times--
			return f
		}
	}
	return nil
}

// wait blocks until Release or until the client has left.
func (r *Registry) wait(q *http.Request) {
	r.mu.Lock()
	released := r.released
	r.mu.Unlock()
	select {
	case <-released:
	case <-q.Context().Done():
	}
}

// A faultyWriter sends content the way its fault wants it.
type faultyWriter struct {
	http.ResponseWriter
	r     *Registry
	q     *http.Request
	rec   *Request
	fault *Fault
}

func (w *faultyWriter) is(name string) bool { return w.fault != nil && w.fault.Name == name }

// begin carries out faults that replace the answer, and tells whether it did.
func (w *faultyWriter) begin() bool {
	for k, v := range w.fault.Header {
		w.Header()[k] = v
	}
	switch w.fault.Name {
	case Hang:
		w.r.wait(w.q)
		panic(http.ErrAbortHandler)
	case Status:
		refuse(w, int(w.fault.At), "FAULT")
	case Redirect:
		http.Redirect(w, w.q, w.r.cdn.URL+w.q.URL.RequestURI()+"?signature=secret-signature", http.StatusTemporaryRedirect)
	case Garbage:
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<html><body>Welcome to the hotel's network</body></html>")
	case Login:
		http.Redirect(w, w.q, w.r.srv.URL+"/login", http.StatusFound)
	case Endless:
		w.Header().Set("Content-Type", "application/vnd.oci.image.index.v1+json")
		for {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return true
			}
		}
	default:
		return false
	}
	return true
}

func (w *faultyWriter) WriteHeader(status int) {
	w.r.mu.Lock()
	w.rec.Status = status
	w.r.mu.Unlock()
	w.ResponseWriter.WriteHeader(status)
}

// Write counts what it is about to send, piece by piece: who has received a byte
// finds it counted.
func (w *faultyWriter) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		piece := p[:min(len(p), 64<<10)]
		w.count(len(piece))
		var m int
		m, err = w.ResponseWriter.Write(piece)
		w.count(m - len(piece))
		n, p = n+m, p[m:]
	}
	return n, err
}

func (w *faultyWriter) count(n int) {
	w.r.mu.Lock()
	defer w.r.mu.Unlock()
	w.rec.Sent += int64(n)
}

// send answers with content or the range of it that was asked for.
func (w *faultyWriter) send(dgst digest.Digest, body []byte) {
	switch {
	case w.is(Lie):
		w.Header().Set("Docker-Content-Digest", digest.FromString("a lie").String())
	case !w.is(NoDigest):
		w.Header().Set("Docker-Content-Digest", dgst.String())
	}
	off, status := int64(0), http.StatusOK
	if rng := w.q.Header.Get("Range"); rng != "" && !w.is(NoRange) {
		first, last, _ := strings.Cut(strings.TrimPrefix(rng, "bytes="), "-")
		off, _ = strconv.ParseInt(first, 10, 64)
		end := int64(len(body))
		if n, err := strconv.ParseInt(last, 10, 64); err == nil {
			end = min(end, n+1)
		}
		if off >= int64(len(body)) {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, end-1, len(body)))
		body, status = body[off:end], http.StatusPartialContent
	}
	if !w.is(NoLength) {
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	}
	w.WriteHeader(status)
	if w.is(NoLength) {
		_ = http.NewResponseController(w.ResponseWriter).Flush()
	}
	if w.q.Method == http.MethodHead {
		return
	}
	if at := int64(0); w.fault != nil && w.fault.At-off >= at && w.fault.At-off < int64(len(body)) {
		at = w.fault.At - off
		switch w.fault.Name {
		case Cut:
			w.part(body[:at])
			panic(http.ErrAbortHandler)
		case Stall:
			w.part(body[:at])
			w.r.wait(w.q)
			body = body[at:]
		case Wrong:
			body = append([]byte(nil), body...)
			body[at] ^= 0xff
		}
	}
	_, _ = w.Write(body) // a client that is gone needs no error
}

func (w *faultyWriter) part(p []byte) {
	_, _ = w.Write(p)
	_ = http.NewResponseController(w.ResponseWriter).Flush()
}
