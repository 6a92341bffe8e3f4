package front_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"tidemark/proxy/front"
)

// A slow is a handler whose requests wait for their end.
type slow struct {
	begun chan struct{} // one for each request that arrived
	end   chan struct{} // closed when they may answer
}

func newSlow() *slow { return &slow{make(chan struct{}, 10), make(chan struct{})} }

func (s *slow) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/fast" {
		return
	}
	fmt.Fprint(w, "begun, ")
	w.(http.Flusher).Flush()
	s.begun <- struct{}{}
	select {
	case <-s.end:
		fmt.Fprint(w, "ended")
	case <-r.Context().Done():
	}
}

// An answer is what a client got in the background.
type answer struct {
	body string
	err  error
}

func ask(c *http.Client, url string) <-chan answer {
	got := make(chan answer, 1)
	go func() {
		resp, err := c.Get(url)
		if err != nil {
			got <- answer{err: err}
			return
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		got <- answer{string(body), err}
	}()
	return got
}

// refusing waits until the server at a URL answers new requests with 503, and
// takes the access lines of those that it began until then.
func refusing(t *testing.T, s *running, c *http.Client, url string) {
	t.Helper()
	for began := time.Now(); time.Since(began) < patience; time.Sleep(time.Millisecond) {
		resp, err := c.Get(url + "/fast")
		if err != nil {
			t.Fatalf("a new request while draining: %v, want 503", err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode == http.StatusServiceUnavailable && strings.Contains(string(body), "UNAVAILABLE") {
			return
		}
		if l := next(t, s.lines, "access line"); l.Path != "/fast" { // it was begun: the stop was not seen yet
			t.Fatalf("line of %s while it is under way", l.Path)
		}
	}
	t.Fatalf("new requests are begun for %v after the stop", patience)
}

// When the server stops, a pull that is under way goes on to its end, and only
// then does Run return; new requests get 503 meanwhile.
func TestPullUnderWayFinishes(t *testing.T) {
	for _, c := range []struct {
		name   string
		scheme string
		start  func(*testing.T, http.Handler) *running
	}{
		{"HTTP/1.1", "http://", func(t *testing.T, h http.Handler) *running { return run(t, front.Options{Handler: h}) }},
		{"HTTP/2", "https://", func(t *testing.T, h http.Handler) *running {
			s, _ := runFiles(t, newPair(t), h)
			return s
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newSlow()
			s := c.start(t, h)
			pull := ask(client(t), c.scheme+s.addr)
			next(t, h.begun, "request")

			s.stop()
			refusing(t, s, client(t), c.scheme+s.addr)
			select {
			case err := <-s.ended:
				t.Fatalf("Run returned %v while a request was under way", err)
			default:
			}
			close(h.end)
			if got := next(t, pull, "answer"); got.err != nil || got.body != "begun, ended" {
				t.Errorf("the pull got %q, %v; want all of it", got.body, got.err)
			}
			if err := next(t, s.ended, "end of Run"); err != nil {
				t.Errorf("Run = %v, want nil", err)
			}
			if l := next(t, s.lines, "access line"); l.Status != 200 || l.Bytes != int64(len("begun, ended")) {
				t.Errorf("line = %+v, want 200 with all bytes", l)
			}
		})
	}
}

// A request that comes while the server drains, on a connection from before the
// stop, is refused with 503: neither its handler nor the access log see it.
func TestRequestWhileDrainingIsNotBegun(t *testing.T) {
	h := newSlow()
	s := run(t, front.Options{Handler: h})
	conn, err := net.Dial("tcp", s.addr) // taken, since the one after it is
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	pull := ask(client(t), "http://"+s.addr+"/slow")
	next(t, h.begun, "request")
	s.stop()
	refusing(t, s, client(t), "http://"+s.addr)

	_ = conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "GET /fast HTTP/1.1\r\nHost: %s\r\n\r\n", s.addr)
	if got, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 503 ") || !strings.Contains(string(got), "Connection: close") {
		t.Errorf("got %q, %v; want 503 and the end of the connection", got, err)
	}
	close(h.end)
	if got := next(t, pull, "answer"); got.err != nil {
		t.Error(got.err)
	}
	if err := next(t, s.ended, "end of Run"); err != nil {
		t.Errorf("Run = %v, want nil", err)
	}
	if l := next(t, s.lines, "access line"); l.Path != "/slow" || len(s.lines) != 0 {
		t.Errorf("line of %s and %d more, want only the one of the pull", l.Path, len(s.lines))
	}
}

// A connection that is kept alive without a request is closed by the stop, so
// that its client connects elsewhere instead of waiting.
func TestIdleConnectionIsClosedByTheStop(t *testing.T) {
	h := newSlow()
	s := run(t, front.Options{Handler: h})
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	r := bufio.NewReader(conn)
	fmt.Fprintf(conn, "GET /fast HTTP/1.1\r\nHost: %s\r\n\r\n", s.addr)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.Close {
		t.Fatalf("first request: %+v, %v; want a connection that is kept", resp, err)
	}
	s.stop()
	if _, err := r.ReadByte(); err != io.EOF {
		t.Errorf("the idle connection: %v, want its end", err)
	}
	if err := next(t, s.ended, "end of Run"); err != nil {
		t.Errorf("Run = %v, want nil", err)
	}
}

// A request that takes longer than the drain is cut off, which its client can
// see, its handler is told, and the log says.
func TestRequestLongerThanTheDrainIsCutOff(t *testing.T) {
	h := newSlow()
	s := run(t, front.Options{Handler: h, Drain: 50 * time.Millisecond})
	pull := ask(client(t), "http://"+s.addr+"/slow")
	next(t, h.begun, "request")
	s.stop()

	if err := next(t, s.ended, "end of Run"); err != nil {
		t.Errorf("Run = %v, want nil", err)
	}
	if got := next(t, pull, "answer"); got.err == nil || got.body != "begun, " {
		t.Errorf("the pull got %q, %v; want what was sent and a broken connection", got.body, got.err)
	}
	if l := next(t, s.lines, "access line"); l.Bytes != int64(len("begun, ")) {
		t.Errorf("line = %+v, want the bytes that were sent", l)
	}
	if got := next(t, s.log, "log line"); !strings.Contains(got, "cut off") || !strings.Contains(got, `"warn"`) {
		t.Errorf("log = %s, want a warning about what was cut off", got)
	}
}
