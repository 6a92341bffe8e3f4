package upstream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tidemark/proxy/upstream"
	"tidemark/proxy/upstream/upstreamtest"
)

// down is the address of an upstream that refuses connections.
func down(t *testing.T) *url.URL {
	t.Helper()
	srv := httptest.NewServer(nil)
	srv.Close()
	return parse(t, srv.URL)
}

// Trouble of one endpoint is the next one's chance; an answer is an answer, and
// no other endpoint is asked for a better one.
func TestEndpointsAreTriedInOrder(t *testing.T) {
	for _, c := range []struct {
		status int // of the first endpoint; 0 refuses connections
		next   bool
	}{
		{0, true},
		{429, true},
		{500, true},
		{503, true},
		{404, false},
		{401, false},
		{403, false},
	} {
		t.Run(fmt.Sprint(c.status), func(t *testing.T) {
			first, second := newRegistry(t), newRegistry(t)
			second.Push("app", "1", upstreamtest.NewImage("layer"))
			first.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: int64(c.status)})
			addr := first.URL()
			if c.status == 0 {
				addr = down(t)
			}
			hub := open(upstream.Options{}, addr, second.URL())

			err := head(t, hub, "app")
			if c.next {
				if err != nil {
					t.Errorf("error = %v, want the second endpoint's manifest", err)
				}
			} else if ue := refusal(t, err); ue.Status != c.status {
				t.Errorf("error = %v, want the first endpoint's %d", ue, c.status)
			}
			if got, want := second.Count("", "") == 1, c.next; got != want {
				t.Errorf("the second endpoint was asked: %v, want %v", got, want)
			}
			if !hub.Health().Healthy {
				t.Errorf("unhealthy, want healthy: it answered (%s)", hub.Health().LastError)
			}
		})
	}
}

// When no endpoint is any good, the last one's trouble is told.
func TestNoEndpointLeft(t *testing.T) {
	first, second := newRegistry(t), newRegistry(t)
	first.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 429})
	second.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 503})
	hub := open(upstream.Options{}, first.URL(), second.URL())

	if ue := refusal(t, head(t, hub, "app")); ue.Status != 503 {
		t.Errorf("error = %v, want the second endpoint's 503", ue)
	}
	if h := hub.Health(); h.Healthy || !strings.Contains(h.LastError, "503") {
		t.Errorf("health = %+v, want unhealthy because of 503", h)
	}
	if a, b := first.Count("", ""), second.Count("", ""); a != 1 || b != 1 {
		t.Errorf("the endpoints were asked %d and %d times, want 1 and 1", a, b)
	}
}

// observed collects the statuses that an upstream reports.
type observed struct {
	mu       sync.Mutex
	statuses []int
}

func (o *observed) add(status int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.statuses = append(o.statuses, status)
}

func (o *observed) all() []int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]int(nil), o.statuses...)
}

// After a refused connection the next request is refused at once, with the same
// cause and without a dial.
func TestRefusedConnectionIsNotDialledAgain(t *testing.T) {
	var told observed
	hub := open(upstream.Options{Observe: told.add}, down(t))
	for range 3 {
		err := head(t, hub, "app")
		if ue := refusal(t, err); ue.Status != 0 || ue.Nonsense || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("error = %v, want a refused connection", err)
		}
	}
	if got := told.all(); fmt.Sprint(got) != "[0]" {
		t.Errorf("statuses observed = %v, want one silence", got)
	}
	if err := head(t, hub, "app"); !strings.Contains(err.Error(), "not asked again for ") {
		t.Errorf("error = %v, does not say that nobody was asked", err)
	}
	if hub.Health().Healthy {
		t.Error("an upstream that refuses connections is healthy")
	}
}

// One endpoint's break does not keep the others from being asked, and the
// broken one costs their clients nothing.
func TestBrokenEndpointIsPassedOver(t *testing.T) {
	first, second := newRegistry(t), newRegistry(t)
	second.Push("app", "1", upstreamtest.NewImage("layer"))
	first.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 429})
	hub := open(upstream.Options{}, first.URL(), second.URL())
	for range 3 {
		if err := head(t, hub, "app"); err != nil {
			t.Error(err)
		}
	}
	if a, b := first.Count("", ""), second.Count("", ""); a != 1 || b != 3 {
		t.Errorf("the endpoints were asked %d and %d times, want 1 and 3", a, b)
	}
}

// A single 500 often concerns a single path: only the third in a row keeps an
// endpoint from being asked.
func TestThirdServerErrorOpensTheBreaker(t *testing.T) {
	reg := newRegistry(t)
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 500})
	hub := open(upstream.Options{}, reg.URL())
	for range 5 {
		if ue := refusal(t, head(t, hub, "app")); ue.Status != 500 {
			t.Errorf("error = %v, want 500", ue)
		}
	}
	if got := reg.Count("", ""); got != 3 {
		t.Errorf("upstream was asked %d times, want 3", got)
	}
}

// An upstream that takes the connection and then says nothing costs a client
// the header timeout, not for ever.
func TestSilenceEndsAfterHeaderTimeout(t *testing.T) {
	reg := newRegistry(t)
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Hang})
	hub := open(upstream.Options{HeaderTimeout: 50 * time.Millisecond}, reg.URL())
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()

	_, err := hub.GetManifest(ctx, "app", "1")
	if ue := refusal(t, err); ue.Status != 0 || ue.Nonsense || !strings.Contains(ue.Error(), "did not answer within 50ms") {
		t.Errorf("error = %v, want silence that names the timeout", ue)
	}
	if ctx.Err() != nil {
		t.Error("the request ended only with its client")
	}
}

// A client that leaves is not upstream's trouble: the next one is let through.
func TestClientThatLeavesDoesNotOpenTheBreaker(t *testing.T) {
	reg := newRegistry(t)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Hang, Times: 1})
	hub := open(upstream.Options{}, reg.URL())
	ctx, leave := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer leave()

	if _, err := hub.HeadManifest(ctx, "app", "1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error = %v, want the client's own deadline", err)
	}
	if err := head(t, hub, "app"); err != nil {
		t.Errorf("the next client: %v", err)
	}
	if !hub.Health().Healthy {
		t.Error("upstream is unhealthy because a client left")
	}
}

// A body that stops arriving is an error that says so, after what did arrive.
func TestStalledBodyEnds(t *testing.T) {
	reg := newRegistry(t)
	img := upstreamtest.NewImage("0123456789")
	reg.Push("app", "1", img)
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Stall, At: 4})
	hub := open(upstream.Options{IdleTimeout: 50 * time.Millisecond}, reg.URL())
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()

	blob, err := hub.GetBlob(ctx, "app", img.Layers[0].Digest, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Body.Close()
	got, err := io.ReadAll(blob.Body)
	if string(got) != "0123" || err == nil || !strings.Contains(err.Error(), "upstream stopped sending") {
		t.Errorf("blob = %q, %v; want 0123 and that upstream stopped sending", got, err)
	}

	_, err = hub.GetManifest(ctx, "app", "1")
	if ue := refusal(t, err); ue.Status != 0 || !strings.Contains(ue.Error(), "upstream stopped sending") {
		t.Errorf("manifest: %v, want that upstream stopped sending", ue)
	}
}

// A connection that breaks in the middle of a body is an error, never a short
// body that looks whole.
func TestCutBodyIsAnError(t *testing.T) {
	reg := newRegistry(t)
	img := upstreamtest.NewImage("0123456789")
	reg.Push("app", "1", img)
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Cut, At: 4})
	hub := open(upstream.Options{}, reg.URL())

	if _, err := hub.GetManifest(t.Context(), "app", "1"); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("manifest: %v, want an unexpected end", err)
	}
	blob, err := hub.GetBlob(t.Context(), "app", img.Layers[0].Digest, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Body.Close()
	if got, err := io.ReadAll(blob.Body); string(got) != "0123" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("blob = %q, %v; want 0123 and an unexpected end", got, err)
	}
}
