// Package front is where connections arrive: listeners, TLS, the access line of
// each request, and an end that lets pulls finish.
package front

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
)

// Options configure a Server. Handler and Addr or Listener are required.
type Options struct {
	Addr     string
	Listener net.Listener // whose connections are answered instead of those to Addr
	Handler  http.Handler
	TLS      *tls.Config // nil is plain HTTP

	// ConnContext, if set, is http.Server's.
	ConnContext func(context.Context, net.Conn) context.Context

	// Access, if set, is called with the line of each request when it has ended.
	Access func(*Line)

	// Drain is how long requests may go on when the server stops. Default 30 s.
	Drain time.Duration

	Log zerolog.Logger
}

// A Server answers on one address.
type Server struct {
	srv      *http.Server
	tls      bool
	addr     string
	access   func(*Line)
	drain    time.Duration
	log      zerolog.Logger
	ln       net.Listener
	draining atomic.Bool
	active   atomic.Int64 // requests under way
}

const (
	// maxHeader bounds the head of a request in bytes.
	maxHeader = 64 << 10
	// headerTimeout bounds the time a client takes to send it.
	headerTimeout = 10 * time.Second
	// idleTimeout is how long a connection waits for its next request. Clients
	// keep theirs for 90 seconds; ours must be the longer one.
	idleTimeout = 3 * time.Minute
)

// New returns the server that o describes. It starts nothing.
func New(o Options) *Server {
	s := &Server{tls: o.TLS != nil, addr: o.Addr, ln: o.Listener, access: o.Access, drain: o.Drain, log: o.Log}
	if s.drain == 0 {
		s.drain = 30 * time.Second
	}
	s.srv = &http.Server{
		Handler:           s.handle(o.Handler),
		TLSConfig:         o.TLS,
		ConnContext:       o.ConnContext,
		MaxHeaderBytes:    maxHeader,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		ErrorLog:          errorLog(o.Log),
	}
	return s
}

// Listen takes the address, so that whoever knows it can connect from now on.
func (s *Server) Listen() error {
	if s.ln != nil {
		return nil
	}
	ln, err := net.Listen("tcp", s.addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	s.ln = ln
	return nil
}

// Addr is the address that is listened on, with the port that was chosen if the
// configuration left it open.
func (s *Server) Addr() net.Addr { return s.ln.Addr() }

// Run answers until ctx ends. Requests that are under way then may go on for
// the time of the drain; new ones are refused.
func (s *Server) Run(ctx context.Context) error {
	failed := make(chan error, 1)
	go func() {
		if s.tls {
			failed <- s.srv.ServeTLS(s.ln, "", "")
			return
		}
		failed <- s.srv.Serve(s.ln)
	}()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", s.addr, err)
	case <-ctx.Done():
	}
	s.draining.Store(true)
	dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.drain)
	defer cancel()
	// net/http hangs up on idle connections as soon as it is told to shut down. A
	// client that sends its next request just then deserves to be told why.
	for tick := time.NewTicker(drainPoll); s.active.Load() > 0 && dctx.Err() == nil; {
		select {
		case <-tick.C:
		case <-dctx.Done():
		}
	}
	err := s.srv.Shutdown(dctx)
	if errors.Is(err, context.DeadlineExceeded) {
		s.log.Warn().Dur("drain", s.drain).Msg("requests were cut off at the end of the drain")
		err = s.srv.Close()
	}
	if serr := <-failed; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}

// drainPoll is how often the end of a drain is looked for.
const drainPoll = 10 * time.Millisecond

// A Line is what the access log says of a request. The handler fills in what it
// knows, through LineOf; front adds the rest when the request has ended.
type Line struct {
	Kind, Upstream, Repo, Tag, Digest, Source string
	Err                                       error

	Method, Path, Client string
	Status               int
	Bytes                int64 // of the body, sent
	Dur                  time.Duration
}

type lineKey struct{}

// LineOf returns the line of a request that a Server handed on, or one that
// nobody reads.
func LineOf(r *http.Request) *Line {
	if l, ok := r.Context().Value(lineKey{}).(*Line); ok {
		return l
	}
	return new(Line)
}

// handle opens the access line, and closes it however the request ends.
func (s *Server) handle(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.draining.Load() {
			w.Header().Set("Connection", "close")
			w.Header().Set("Retry-After", "5")
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = io.WriteString(w, `{"errors":[{"code":"UNAVAILABLE","message":"this server is shutting down"}]}`)
			return
		}
		s.active.Add(1)
		defer s.active.Add(-1)
		if s.access == nil {
			next.ServeHTTP(w, r)
			return
		}
		began := time.Now()
		line := &Line{Method: r.Method, Path: r.URL.Path, Client: r.RemoteAddr}
		cw := &countingWriter{ResponseWriter: w, head: r.Method == http.MethodHead}
		aborted := true
		defer func() {
			if cw.status == 0 && !aborted {
				cw.status = http.StatusOK // net/http says so for a handler that says nothing
			}
			line.Status, line.Bytes, line.Dur = cw.status, cw.bytes, time.Since(began)
			s.access(line)
		}()
		next.ServeHTTP(cw, r.WithContext(context.WithValue(r.Context(), lineKey{}, line)))
		aborted = false
	})
}

// A countingWriter counts what is sent, and keeps the ways in which the kernel
// can send a file by itself.
type countingWriter struct {
	http.ResponseWriter
	head   bool // of a HEAD no body is sent, whatever is written
	status int
	bytes  int64
}

func (w *countingWriter) WriteHeader(status int) {
	if w.status == 0 && status >= http.StatusOK { // 1xx come before the answer
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *countingWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(p)
	w.count(int64(n))
	return n, err
}

// ReadFrom implements io.ReaderFrom: net/http's own uses sendfile(2) for files.
func (w *countingWriter) ReadFrom(r io.Reader) (int64, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := io.Copy(w.ResponseWriter, r)
	w.count(n)
	return n, err
}

func (w *countingWriter) count(n int64) {
	if !w.head {
		w.bytes += n
	}
}

// Flush implements http.Flusher.
func (w *countingWriter) Flush() {
	// A writer that cannot flush sends when it sends.
	_ = http.NewResponseController(w.ResponseWriter).Flush()
}

// Unwrap is for http.ResponseController.
func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Log writes the line.
func (l *Line) Log(log *zerolog.Logger) {
	level := zerolog.InfoLevel
	refused := l.Status >= http.StatusBadRequest && l.Status < http.StatusInternalServerError // told as it is
	if l.Err != nil && !refused || l.Status >= http.StatusInternalServerError {
		level = zerolog.WarnLevel
	}
	e := log.WithLevel(level)
	if e == nil {
		return
	}
	e.Str("method", l.Method).Str("path", l.Path).Int("status", l.Status)
	for _, f := range [...]struct{ key, value string }{
		{"kind", l.Kind}, {"upstream", l.Upstream}, {"repo", l.Repo}, {"tag", l.Tag}, {"digest", l.Digest}, {"source", l.Source},
	} {
		if f.value != "" {
			e.Str(f.key, f.value)
		}
	}
	e.Int64("bytes", l.Bytes).Str("dur", strconv.FormatFloat(l.Dur.Seconds(), 'f', 4, 64)+"s").Str("client", l.Client).AnErr("err", l.Err).Msg("request")
}
