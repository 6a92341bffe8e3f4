package upstream

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// refusalOf leaves out who holds the probe.
func refusalOf(e *Error, _ probe) *Error { return e }

func fellSilent() *Error {
	return &Error{Upstream: "hub", Op: "GET /v2/", Err: syscall.ECONNREFUSED}
}

// synctestStep is the smallest time that can pass.
func synctestStep() { time.Sleep(1 * time.Nanosecond) }

// untilProbe is how long b refuses; the request after it is the probe.
func untilProbe(t *testing.T, b *breaker) time.Duration {
	t.Helper()
	wait := time.Until(b.until)
	time.Sleep(wait - 1)
	if refusalOf(b.refuses()) == nil {
		t.Errorf("a request goes through before %v are over", wait)
	}
	synctestStep()
	if e := refusalOf(b.refuses()); e != nil {
		t.Errorf("no probe goes through after %v: %v", wait, e)
	}
	return wait
}

// Silence opens the breaker at once. When its time is over one probe goes
// through while others wait for its outcome, and the probe's success lets
// everybody through.
func TestSilenceOpensAndOneProbeCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b breaker
		if e := refusalOf(b.refuses()); e != nil {
			t.Errorf("a new breaker refuses: %v", e)
		}
		b.done(probe(b.probing), false, fellSilent(), false)
		e := refusalOf(b.refuses())
		if e == nil || !errors.Is(e, syscall.ECONNREFUSED) || e.Status != 0 || !strings.Contains(e.Error(), "not asked again for ") {
			t.Errorf("after silence: %v, want refused with its cause", e)
		}
		if took := untilProbe(t, &b); took < breakerFirst || took > breakerFirst*5/4 {
			t.Errorf("the probe goes through after %v, want %v and up to a quarter more", took, breakerFirst)
		}
		for range 5 {
			if refusalOf(b.refuses()) == nil {
				t.Error("a second probe goes through beside the first")
			}
		}
		b.done(probe(b.probing), false, nil, false)
		for range 5 {
			if e := refusalOf(b.refuses()); e != nil {
				t.Errorf("after a good probe: %v, want nobody refused", e)
			}
		}
	})
}

// Each probe that fails doubles the wait, up to half a minute and a quarter.
func TestFailedProbesDoubleTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b breaker
		want := breakerFirst
		for range 12 {
			b.done(probe(b.probing), false, fellSilent(), false)
			if took := untilProbe(t, &b); took < want || took > want*5/4 {
				t.Errorf("wait = %v, want %v and up to a quarter more", took, want)
			}
			want = min(want*2, breakerMost)
		}
		b.done(probe(b.probing), false, nil, false)
		b.done(probe(b.probing), false, fellSilent(), false)
		if took := untilProbe(t, &b); took > breakerFirst*5/4 {
			t.Errorf("wait after a success and a failure = %v, want %v again", took, breakerFirst)
		}
	})
}

// A probe whose client leaves says nothing: the next request is the probe.
func TestLostProbeIsFollowedByAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b breaker
		b.done(probe(b.probing), false, fellSilent(), false)
		untilProbe(t, &b)
		b.done(probe(b.probing), true, fellSilent(), false)
		if e := refusalOf(b.refuses()); e != nil {
			t.Errorf("after a lost probe: %v, want another one", e)
		}
	})
}

// Many requests that fail together are one failure, not many in a row.
func TestConcurrentFailuresAreOneBreak(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b breaker
		for range 10 {
			b.done(probe(b.probing), false, fellSilent(), false)
		}
		if took := untilProbe(t, &b); took > breakerFirst*5/4 {
			t.Errorf("ten failures at once break for %v, want %v", took, breakerFirst)
		}
	})
}

// Who is refused is told of the request that was refused, not of another one.
func TestRefusalNamesItsOwnRequest(t *testing.T) {
	u := newUpstream(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "60")
		w.WriteHeader(http.StatusTooManyRequests)
	}))
	_, _ = u.HeadManifest(t.Context(), "acme/secret", "1")
	_, err := u.HeadManifest(t.Context(), "app", "2")
	if err == nil || !strings.Contains(err.Error(), "HEAD /v2/app/manifests/2: 429") || strings.Contains(err.Error(), "secret") {
		t.Errorf("refused with %v", err)
	}
}

// Server errors open the breaker after three in a row, 429 at once and for as
// long as upstream asks; whoever is refused is told the same status.
func TestStatusesOpenTheBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b breaker
		failure := &Error{Upstream: "hub", Op: "GET /v2/", Status: 502}
		for range 3 {
			b.done(probe(b.probing), false, failure, false)
			b.done(probe(b.probing), false, failure, false)
			if e := refusalOf(b.refuses()); e != nil {
				t.Errorf("after two server errors: %v, want nobody refused", e)
			}
			b.done(probe(b.probing), false, nil, false)
		}
		for range 3 {
			b.done(probe(b.probing), false, failure, false)
		}
		if e := refusalOf(b.refuses()); e == nil || e.Status != 502 {
			t.Errorf("after three server errors: %v, want refused with 502", e)
		}

		b.done(probe(b.probing), false, nil, false)
		b.done(probe(b.probing), false, &Error{Upstream: "hub", Op: "GET /v2/", Status: 429, RetryAfter: time.Minute}, false)
		e := refusalOf(b.refuses())
		if e == nil || e.Status != 429 || e.RetryAfter != time.Minute {
			t.Errorf("after 429: %+v, want refused with 429 for a minute", e)
		}
		if took := untilProbe(t, &b); took != time.Minute {
			t.Errorf("the probe goes through after %v, want a minute", took)
		}
	})
}

// An upstream that is down is dialled once, then once for each back-off, and
// used again with the first probe that gets an answer.
func TestUpstreamThatComesBackIsFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dials int
		up := false
		u := newUpstream(nil)
		u.client.Transport.(*authTransport).own = roundTrip(func(req *http.Request) (*http.Response, error) {
			dials++
			if !up {
				return nil, syscall.ECONNREFUSED
			}
			return served{http.NotFoundHandler()}.RoundTrip(req)
		})
		ask := func() error {
			_, err := u.HeadManifest(t.Context(), "app", "1")
			return err
		}
		for range 10 {
			if err := ask(); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("error = %v, want a refused connection", err)
			}
		}
		if dials != 1 {
			t.Errorf("%d dials for ten requests, want 1", dials)
		}
		time.Sleep(breakerFirst * 5 / 4)
		for range 10 {
			_ = ask() // refused, like those before
		}
		if dials != 2 {
			t.Errorf("%d dials after the back-off, want 2", dials)
		}
		up = true
		time.Sleep(2 * breakerFirst * 5 / 4)
		var e *Error
		if err := ask(); !errors.As(err, &e) || e.Status != 404 || dials != 3 {
			t.Errorf("error = %v after %d dials, want the 404 of an upstream that is back after 3", err, dials)
		}
		if !u.Health().Healthy {
			t.Error("an upstream that is back is unhealthy")
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// A 404 is believed for three seconds, so that who pushes and then pulls finds
// what was pushed.
func TestMissingIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		u := newUpstream(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			asked++
			w.WriteHeader(http.StatusNotFound)
		}))
		for _, c := range []struct {
			after time.Duration
			asked int
		}{{0, 1}, {missingFor - time.Millisecond, 1}, {2 * time.Millisecond, 2}, {0, 2}} {
			time.Sleep(c.after)
			if _, err := u.HeadManifest(t.Context(), "app", "1"); err == nil || asked != c.asked {
				t.Errorf("after %v more: %v, upstream asked %d times, want %d", c.after, err, asked, c.asked)
			}
		}
	})
}

// The time a reader takes between reads is not upstream's; the time a byte
// takes to arrive is.
func TestIdleTimeoutCountsOnlyReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		pr, pw := io.Pipe()
		b := &idleBody{ReadCloser: pr, ctx: ctx, cancel: cancel, idle: time.Second}
		b.timer = time.AfterFunc(time.Second, func() { cancel(errStalled) })
		b.timer.Stop()
		time.Sleep(time.Hour) // nobody reads yet
		p := make([]byte, 1)
		go func() {
			for range 3 {
				time.Sleep(900 * time.Millisecond)
				_, _ = pw.Write([]byte{'x'})
			}
		}()
		for range 3 {
			if n, err := b.Read(p); n != 1 || err != nil {
				t.Fatalf("read = %d, %v; want a byte", n, err)
			}
		}
		time.Sleep(time.Hour)
		if err := context.Cause(ctx); err != nil {
			t.Errorf("a slow reader ended the request: %v", err)
		}
		began := time.Now()
		context.AfterFunc(ctx, func() { pw.CloseWithError(context.Cause(ctx)) })
		if _, err := b.Read(p); !errors.Is(err, errStalled) || time.Since(began) != time.Second {
			t.Errorf("silence = %v after %v, want %v after 1s", err, time.Since(began), errStalled)
		}
		b.Close()
	})
}
