package front_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"tidemark/proxy/front"
)

// patience bounds the wait for something that must happen.
const patience = 5 * time.Second

// A running is a server that answers until it is stopped.
type running struct {
	addr  string
	lines chan *front.Line // of requests that ended
	log   chan string      // lines of the server's own log
	stop  context.CancelFunc
	ended chan error // what Run returned
}

// run starts a server on loopback; the test need not stop it.
func run(t *testing.T, o front.Options) *running {
	t.Helper()
	s := &running{lines: make(chan *front.Line, 100), log: make(chan string, 1000), ended: make(chan error, 1)}
	o.Addr, o.Access = "127.0.0.1:0", func(l *front.Line) { s.lines <- l }
	o.Log = zerolog.New(logTo(s.log))
	srv := front.New(o)
	if err := srv.Listen(); err != nil {
		t.Fatal(err)
	}
	s.addr = srv.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	done := make(chan struct{})
	go func() {
		s.ended <- srv.Run(ctx)
		close(done)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return s
}

// logTo passes on lines of a log.
type logTo chan string

func (l logTo) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}

// next waits for what must arrive.
func next[T any](t *testing.T, from <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		t.Fatalf("no %s within %v", what, patience)
		panic("unreachable")
	}
}

// client is a client of its own for each test, so that connections are too.
func client(t *testing.T) *http.Client {
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 2 * patience}
}

func get(t *testing.T, c *http.Client, url string) (status int, body []byte) {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, body
}

// A hot file goes out whole and is counted, by whichever way a handler sends
// it, and handlers see a writer through which the kernel can send it.
func TestHotFileGoesOutWholeAndIsCounted(t *testing.T) {
	want := make([]byte, 2<<20+123)
	rand.NewChaCha8([32]byte{}).Read(want)
	name := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(name, want, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		send   func(http.ResponseWriter, *http.Request, *os.File)
		rng    string
		status int
		body   []byte
	}{
		{name: "copied", status: 200, body: want, send: func(w http.ResponseWriter, _ *http.Request, f *os.File) {
			w.Header().Set("Content-Length", strconv.Itoa(len(want)))
			if n, err := io.Copy(w, f); err != nil || n != int64(len(want)) {
				t.Errorf("copied %d bytes, %v; want %d", n, err, len(want))
			}
		}},
		{name: "written", status: 201, body: want, send: func(w http.ResponseWriter, _ *http.Request, f *os.File) {
			w.WriteHeader(http.StatusCreated)
			if n, err := io.Copy(struct{ io.Writer }{w}, f); err != nil || n != int64(len(want)) {
				t.Errorf("wrote %d bytes, %v; want %d", n, err, len(want))
			}
		}},
		{name: "served", status: 200, body: want, send: func(w http.ResponseWriter, r *http.Request, f *os.File) {
			http.ServeContent(w, r, "", time.Time{}, f)
		}},
		{name: "a range", rng: "bytes=5-1000004", status: 206, body: want[5:1000005], send: func(w http.ResponseWriter, r *http.Request, f *os.File) {
			http.ServeContent(w, r, "", time.Time{}, f)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := run(t, front.Options{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if _, ok := w.(io.ReaderFrom); !ok {
					t.Error("the writer is no io.ReaderFrom: sendfile cannot be used")
				}
				f, err := os.Open(name)
				if err != nil {
					t.Error(err)
					return
				}
				defer f.Close()
				c.send(w, r, f)
			})})
			req, err := http.NewRequest(http.MethodGet, "http://"+s.addr+"/v2/app/blobs/x?y=z", nil)
			if err != nil {
				t.Fatal(err)
			}
			if c.rng != "" {
				req.Header.Set("Range", c.rng)
			}
			resp, err := client(t).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, c.body) || resp.StatusCode != c.status {
				t.Errorf("client got %d with %d bytes, %v; want %d with all %d", resp.StatusCode, len(got), err, c.status, len(c.body))
			}
			l := next(t, s.lines, "access line")
			if l.Status != c.status || l.Bytes != int64(len(c.body)) || l.Method != "GET" || l.Path != "/v2/app/blobs/x" || l.Dur <= 0 || !strings.HasPrefix(l.Client, "127.0.0.1:") {
				t.Errorf("line = %+v, want GET /v2/app/blobs/x of 127.0.0.1 with %d and %d bytes", l, c.status, len(c.body))
			}
		})
	}
}

// What a handler says and does not say ends up in its line: the fields it
// fills in, the first status, and 200 for a handler that says nothing.
func TestLineSaysWhatTheHandlerSaid(t *testing.T) {
	for _, c := range []struct {
		name   string
		handle http.HandlerFunc
		status int
		bytes  int64
	}{
		{"nothing", func(http.ResponseWriter, *http.Request) {}, 200, 0},
		{"a body", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "12345") }, 200, 5},
		{"a status", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) }, 404, 0},
		{"two statuses", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404); w.WriteHeader(500) }, 404, 0},
		{"a body, then a status", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "1"); w.WriteHeader(500) }, 200, 1},
		{"in pieces", func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "1")
			w.(http.Flusher).Flush()
			fmt.Fprint(w, "23")
		}, 200, 3},
		{"a deadline", func(w http.ResponseWriter, _ *http.Request) {
			if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(time.Hour)); err != nil {
				w.WriteHeader(500)
			}
		}, 200, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := run(t, front.Options{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				line := front.LineOf(r)
				line.Repo, line.Source = "app", "cache"
				c.handle(w, r)
			})})
			status, body := get(t, client(t), "http://"+s.addr)
			l := next(t, s.lines, "access line")
			if l.Status != c.status || l.Bytes != c.bytes || l.Repo != "app" || l.Source != "cache" {
				t.Errorf("line = %+v, want %d with %d bytes for app from cache", l, c.status, c.bytes)
			}
			if status != c.status || int64(len(body)) != c.bytes {
				t.Errorf("client got %d with %d bytes, want what the line says", status, len(body))
			}
		})
	}
}

// Outside a server a line can be filled in all the same; nobody reads it.
func TestLineOutsideAServer(t *testing.T) {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	l := front.LineOf(r)
	l.Repo = "app"
	if got := front.LineOf(r); got == l || got.Repo != "" {
		t.Errorf("a second line = %+v, want a new one", got)
	}
}

// An aborted answer closes its line with what was sent until then, and reaches
// the client as broken, not as short.
func TestAbortedAnswerClosesItsLine(t *testing.T) {
	for _, c := range []struct {
		name   string
		sends  string
		status int
	}{
		{"before the first byte", "", 0},
		{"in the middle", "12345", 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := run(t, front.Options{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if c.sends != "" {
					w.Header().Set("Content-Length", "10")
					fmt.Fprint(w, c.sends)
					w.(http.Flusher).Flush()
				}
				panic(http.ErrAbortHandler)
			})})
			resp, err := client(t).Get("http://" + s.addr)
			if err == nil {
				_, err = io.ReadAll(resp.Body)
				resp.Body.Close()
			}
			if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
				t.Errorf("client got %v, want a broken connection", err)
			}
			l := next(t, s.lines, "access line")
			if l.Status != c.status || l.Bytes != int64(len(c.sends)) {
				t.Errorf("line says %d with %d bytes, want %d with %d", l.Status, l.Bytes, c.status, len(c.sends))
			}
		})
	}
}

// A line is logged once, with what is known and without empty fields, as a
// warning when it went wrong.
func TestLineInTheLog(t *testing.T) {
	for _, c := range []struct {
		name  string
		line  front.Line
		level string
		keys  int // of the JSON object
	}{
		{"served", front.Line{Method: "GET", Path: "/v2/", Status: 200, Client: "c"}, "info", 8},
		{"known", front.Line{Method: "GET", Path: "/v2/", Status: 200, Client: "c", Repo: "app", Tag: "1"}, "info", 10},
		{"absent", front.Line{Method: "GET", Path: "/v2/", Status: 404, Client: "c"}, "info", 8},
		{"failed", front.Line{Method: "GET", Path: "/v2/", Status: 502, Client: "c"}, "warn", 8},
		{"stale", front.Line{Method: "GET", Path: "/v2/", Status: 200, Client: "c", Err: errors.New("upstream is down")}, "warn", 9},
	} {
		var out bytes.Buffer
		log := zerolog.New(&out)
		c.line.Log(&log)
		var got map[string]any
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatalf("%s: %q is not one line of JSON: %v", c.name, out.String(), err)
		}
		if got["level"] != c.level || got["message"] != "request" || got["status"] != float64(c.line.Status) || len(got) != c.keys {
			t.Errorf("%s: %v, want %s with %d fields", c.name, got, c.level, c.keys)
		}
	}
}

// A request whose head is larger than any registry client's gets 431, and the
// server goes on.
func TestOversizedHeadIsRefused(t *testing.T) {
	s := run(t, front.Options{Handler: http.NotFoundHandler()})
	for _, c := range []struct {
		name  string
		alter func(*http.Request)
	}{
		{"header", func(r *http.Request) { r.Header.Set("X-Large", strings.Repeat("x", 128<<10)) }},
		{"path", func(r *http.Request) { r.URL.Path = "/" + strings.Repeat("x", 128<<10) }},
	} {
		req, err := http.NewRequest(http.MethodGet, "http://"+s.addr, nil)
		if err != nil {
			t.Fatal(err)
		}
		c.alter(req)
		resp, err := client(t).Do(req)
		if err != nil {
			t.Fatalf("oversized %s: %v", c.name, err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("oversized %s: status %d, want 431", c.name, resp.StatusCode)
		}
	}
	if status, _ := get(t, client(t), "http://"+s.addr); status != 404 {
		t.Errorf("the next request: status %d, want the handler's 404", status)
	}
	if l := next(t, s.lines, "access line"); l.Status != 404 {
		t.Errorf("line says %d, want only the request that was handed on", l.Status)
	}
}

// An address that is taken is an error of Listen, not of the first request.
func TestTakenAddressIsAnErrorAtOnce(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if err := front.New(front.Options{Addr: ln.Addr().String()}).Listen(); err == nil || !strings.Contains(err.Error(), ln.Addr().String()) {
		t.Errorf("error = %v, want one that names %s", err, ln.Addr())
	}
}
