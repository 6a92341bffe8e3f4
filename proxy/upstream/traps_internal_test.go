package upstream

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"
)

// at is an upstream with short time-outs whose server is h.
func at(t *testing.T, h http.HandlerFunc) (*Upstream, *url.URL) {
	srv := httptest.NewServer(h)
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	a, _ := url.Parse(srv.URL)
	return New(Options{Name: "hub", Endpoints: []*url.URL{a}, IdleTimeout: 50 * time.Millisecond, HeaderTimeout: 50 * time.Millisecond}), a
}

// A repository whose name has the words of a route gets a token for all of its
// name.
func TestScopeIsOfTheWholeName(t *testing.T) {
	for path, want := range map[string]string{
		"/v2/acme/manifests/app/blobs/sha256:00": "repository:acme/manifests/app:pull",
		"/v2/acme/manifests/app/tags/list":       "repository:acme/manifests/app:pull",
		"/v2/acme/blobs/app/tags/list":           "repository:acme/blobs/app:pull",
	} {
		if got := scopeOf(path); got != want {
			t.Errorf("scope of %s = %q, want %q", path, got, want)
		}
	}
}

// A redirect that leads nowhere is told without its signed query.
func TestBadRedirectShowsNoSignature(t *testing.T) {
	for _, loc := range []string{"http://[::1/blob?signature=secret-signature", "http://a b/?signature=secret-signature", "foo://x/?signature=secret-signature", "http://x:99999/?signature=secret-signature", "http:///?signature=secret-signature"} {
		u, _ := at(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", loc)
			w.WriteHeader(307)
		})
		if _, err := u.HeadManifest(t.Context(), "app", "1"); err == nil || strings.Contains(err.Error(), "secret-signature") {
			t.Errorf("redirect to %s: %v", loc, err)
		}
	}
}

// No Retry-After silences us for more than an hour.
func TestRetryAfterIsBounded(t *testing.T) {
	for _, s := range []string{"9223372037", "99999999999"} {
		if got := retryAfter(s); got != time.Hour {
			t.Errorf("Retry-After %s = %v, want 1h", s, got)
		}
	}
	if got := retryAfter("99999999999999999999"); got != time.Hour {
		t.Errorf("huge: %v", got)
	}
}

// realmStatus is an upstream whose token realm answers with status, and how
// often it was asked.
func realmStatus(t *testing.T, status int) (*Upstream, *int) {
	n := new(int)
	var a *url.URL
	u, a := at(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			*n++
			w.Header().Set("Retry-After", "60")
			w.WriteHeader(status)
			return
		}
		w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="%s/token"`, a))
		w.WriteHeader(401)
	})
	return u, n
}

// A token realm's 404 says nothing about what was to be pulled.
func TestRealmThatIsMissingIsNotAMissingManifest(t *testing.T) {
	u, _ := realmStatus(t, 404)
	_, err := u.HeadManifest(t.Context(), "app", "1")
	if errors.Is(err, fs.ErrNotExist) {
		t.Errorf("realm's 404: %v is fs.ErrNotExist", err)
	}
}

// A token realm that is limited or broken opens the breaker.
func TestRealmInTroubleIsNotAskedByEverybody(t *testing.T) {
	for _, s := range []int{429, 503} {
		u, n := realmStatus(t, s)
		for range 5 {
			_, _ = u.HeadManifest(t.Context(), "app", "1") // refused
		}
		if *n != 1 && s == 429 || *n > 3 {
			t.Errorf("realm says %d: asked %d times", s, *n)
		}
	}
}

// An upstream that offers Basic and Bearer gets a token.
func TestBearerIsPreferredToBasic(t *testing.T) {
	for _, hs := range [][]string{{`Basic realm="x"`, `Bearer realm="https://hub.example/token"`}, {`Basic realm="x", Bearer realm="https://hub.example/token"`}} {
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/token" {
				fmt.Fprint(w, `{"token":"token-1"}`)
				return
			}
			if r.Header.Get("Authorization") != "Bearer token-1" {
				w.Header()["Www-Authenticate"] = hs
				w.WriteHeader(401)
			}
		})
		if _, err := newUpstream(h).HeadManifest(t.Context(), "app", "1"); err != nil {
			t.Errorf("anonymous, %q: %v", hs, err)
		}
	}
}

// An upstream that changes from Basic to tokens needs no restart.
func TestUpstreamMayChangeToTokens(t *testing.T) {
	bearer := false
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := r.Header.Get("Authorization")
		switch {
		case r.URL.Path == "/token":
			fmt.Fprint(w, `{"token":"token-1"}`)
		case !bearer && !strings.HasPrefix(a, "Basic"):
			w.Header().Set("Www-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
		case bearer && a != "Bearer token-1":
			w.Header().Set("Www-Authenticate", `Bearer realm="https://hub.example/token"`)
			w.WriteHeader(401)
		}
	})
	u := newUpstream(h)
	u.auth.keys.ask = Static("x", "y")
	_, err := u.HeadManifest(t.Context(), "app", "1")
	if err != nil {
		t.Fatal(err)
	}
	bearer = true
	for range 2 {
		if _, err = u.HeadManifest(t.Context(), "app", "1"); err != nil {
			t.Errorf("after the change to bearer: %v", err)
		}
	}
}

// Tokens are kept by scope also below an endpoint with a path.
func TestEndpointWithAPathKeepsItsTokens(t *testing.T) {
	good, n, refused := "token-1", 0, 0
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			n++
			fmt.Fprintf(w, `{"token":"token-%d"}`, n)
		case r.Header.Get("Authorization") != "Bearer "+good:
			refused++
			w.Header().Set("Www-Authenticate", `Bearer realm="https://hub.example/token",scope="repository:app:pull"`)
			w.WriteHeader(401)
		}
	})
	u := newUpstream(h)
	u.endpoints[0].url.Path = "/prefix"
	for range 5 {
		if _, err := u.HeadManifest(t.Context(), "app", "1"); err != nil {
			t.Error(err)
		}
	}
	if refused != 1 {
		t.Errorf("endpoint with a path: %d refused requests for 5, want 1", refused)
	}
	good = "token-2"
	if _, err := u.HeadManifest(t.Context(), "app", "1"); err != nil {
		t.Errorf("endpoint with a path, after the token was revoked: %v", err)
	}
}

// An answer that stalls ends, whatever its status.
func TestRefusalThatStallsEnds(t *testing.T) {
	for _, status := range []int{401, 404, 500, 307} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			u, _ := at(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Www-Authenticate", `Bearer realm="http://`+r.Host+`/token"`)
				if r.URL.Path == "/token" {
					fmt.Fprint(w, `{"token":"a"}`)
					return
				}
				w.Header().Set("Location", "/x")
				w.Header().Set("Content-Length", "100")
				w.WriteHeader(status)
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			})
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			_, err := u.GetManifest(ctx, "app", "1")
			if ctx.Err() != nil {
				t.Errorf("%d whose body stalls: hung until the client left: %v", status, err)
			}
		})
	}
}

// A token of one endpoint is not sent to another.
func TestTokensBelongToTheirEndpoint(t *testing.T) {
	var urls []*url.URL
	var saw [2][]string
	for i := range 2 {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/token" {
				fmt.Fprintf(w, `{"token":"token-of-%d"}`, i)
				return
			}
			a := r.Header.Get("Authorization")
			saw[i] = append(saw[i], a)
			if a != fmt.Sprintf("Bearer token-of-%d", i) {
				w.Header().Set("Www-Authenticate", `Bearer realm="http://`+r.Host+`/token"`)
				w.WriteHeader(401)
				return
			}
			if i == 0 {
				w.WriteHeader(500)
			}
		}))
		t.Cleanup(srv.Close)
		a, _ := url.Parse(srv.URL)
		urls = append(urls, a)
	}
	u := New(Options{Name: "hub", Endpoints: urls})
	if _, err := u.HeadManifest(t.Context(), "app", "1"); err != nil {
		t.Error(err)
	}
	if strings.Contains(fmt.Sprint(saw[1]), "token-of-0") {
		t.Errorf("second endpoint saw %q", saw[1])
	}
}
