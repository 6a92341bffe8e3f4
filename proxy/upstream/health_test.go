package upstream_test

import (
	"net/http"
	"strings"
	"testing"

	"tidemark/proxy/upstream"
	"tidemark/proxy/upstream/upstreamtest"
)

// What upstream says about its rate limit is kept for people to see, also when
// it says it together with a refusal, and is -1 until it says something.
func TestRateLimitIsKept(t *testing.T) {
	reg := newRegistry(t)
	hub := open(upstream.Options{}, reg.URL())
	if got := hub.Health().RateLimitRemaining; got != -1 {
		t.Errorf("remaining before any answer = %d, want -1", got)
	}
	for _, c := range []struct {
		header string
		want   int64
	}{
		{"76;w=21600", 76},
		{"75", 75},
		{"0;w=21600", 0},
		{"plenty", 0},
		{"-3", 0},
	} {
		reg.Reset()
		reg.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 403, Header: http.Header{"Ratelimit-Remaining": {c.header}}})
		if _, err := hub.HeadManifest(t.Context(), "app", "1"); refusal(t, err).Status != 403 {
			t.Errorf("error = %v, want 403", err)
		}
		if got := hub.Health().RateLimitRemaining; got != c.want {
			t.Errorf("remaining after %q = %d, want %d", c.header, got, c.want)
		}
	}
}

// An upstream is unhealthy from a failure on until its next good answer, and
// Health says why without asking it.
func TestHealthIsWhatTheLastRequestSaid(t *testing.T) {
	reg := newRegistry(t)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	hub := open(upstream.Options{}, reg.URL())
	if h := hub.Health(); !h.Healthy || h.LastError != "" {
		t.Errorf("before any request: %+v, want healthy", h)
	}
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 500, Times: 1})
	if _, err := hub.HeadManifest(t.Context(), "app", "1"); refusal(t, err).Status != 500 {
		t.Errorf("error = %v, want 500", err)
	}
	if h := hub.Health(); h.Healthy || !strings.Contains(h.LastError, "500 Internal Server Error") {
		t.Errorf("after a 500: %+v, want unhealthy because of it", h)
	}
	if _, err := hub.HeadManifest(t.Context(), "app", "1"); err != nil {
		t.Error(err)
	}
	if h := hub.Health(); !h.Healthy || h.LastError != "" {
		t.Errorf("after a good answer: %+v, want healthy", h)
	}
	if got := reg.Count("", ""); got != 2 {
		t.Errorf("upstream was asked %d times, want 2: health asks nothing", got)
	}
}
