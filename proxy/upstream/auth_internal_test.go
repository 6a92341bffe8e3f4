package upstream

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// served answers requests without a network, so that time can be a bubble's.
type served struct{ http.Handler }

func (s served) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	rec := httptest.NewRecorder()
	s.ServeHTTP(rec, req)
	resp := rec.Result()
	resp.Request = req
	return resp, nil
}

// A hub is a registry whose tokens are numbered and can be revoked.
type hub struct {
	answer  string        // of the realm, with the number of the token
	release chan struct{} // if set, tokens are given out once it is closed

	mu      sync.Mutex
	good    int // the number of the token that is taken
	tokens  int
	refused int
	served  int
}

func (h *hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/token" && h.release != nil {
		select {
		case <-h.release:
		case <-r.Context().Done():
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case r.URL.Path == "/token":
		h.tokens++
		h.good = h.tokens
		fmt.Fprintf(w, h.answer, h.tokens)
	case r.Header.Get("Authorization") == fmt.Sprintf("Bearer token-%d", h.good):
		h.served++
	default:
		h.refused++
		w.Header().Set("Www-Authenticate", `Bearer realm="https://hub.example/token",service="hub.example"`)
		w.WriteHeader(http.StatusUnauthorized)
	}
}

// want compares what the hub was asked so far.
func (h *hub) want(t *testing.T, tokens, refused, served int) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.tokens != tokens || h.refused != refused || h.served != served {
		t.Errorf("%d tokens, %d requests refused, %d served; want %d, %d, %d", h.tokens, h.refused, h.served, tokens, refused, served)
	}
}

// newUpstream is an Upstream whose only endpoint is h.
func newUpstream(h http.Handler) *Upstream {
	u := New(Options{Name: "hub", Endpoints: []*url.URL{{Scheme: "https", Host: "hub.example"}}})
	auth := u.client.Transport.(*authTransport)
	auth.own, auth.foreign = served{h}, served{h}
	return u
}

// A token is used for nine tenths of the time it is said to be valid, a minute
// if nothing is said, a day at most; then another is fetched.
func TestTokenIsUsedWhileItIsValid(t *testing.T) {
	for _, c := range []struct {
		answer string
		used   time.Duration
	}{
		{`{"token":"token-%d","expires_in":300}`, 270 * time.Second},
		{`{"token":"token-%d","expires_in":1}`, 900 * time.Millisecond},
		{`{"token":"token-%d"}`, 54 * time.Second},
		{`{"token":"token-%d","expires_in":-5}`, 54 * time.Second},
		{`{"token":"token-%d","expires_in":9000000000000000000}`, 24 * time.Hour * 9 / 10},
	} {
		t.Run(c.answer, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := &hub{answer: c.answer}
				u := newUpstream(h)
				ask := func() {
					t.Helper()
					if _, err := u.HeadManifest(t.Context(), "app", "1"); err != nil {
						t.Fatal(err)
					}
				}
				ask()
				h.want(t, 1, 1, 1)
				time.Sleep(c.used - time.Millisecond)
				ask()
				h.want(t, 1, 1, 2)
				time.Sleep(2 * time.Millisecond)
				ask()
				h.want(t, 2, 2, 3)
			})
		})
	}
}

// A token that is revoked before its time is replaced without the client
// noticing, and the new one is used from then on.
func TestRevokedTokenIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &hub{answer: `{"token":"token-%d","expires_in":300}`}
		u := newUpstream(h)
		for i := range 3 {
			if i == 1 {
				h.good = -1
			}
			if _, err := u.HeadManifest(t.Context(), "app", "1"); err != nil {
				t.Fatal(err)
			}
		}
		h.want(t, 2, 2, 3)
	})
}

// A crowd that waits for the same token gets one, and the one who asked first
// may leave without the others going away empty.
func TestOneTokenForACrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &hub{answer: `{"token":"token-%d","expires_in":300}`, release: make(chan struct{})}
		u := newUpstream(h)
		ctx, leave := context.WithCancel(t.Context())
		first := make(chan error, 1)
		go func() {
			_, err := u.HeadManifest(ctx, "app", "1")
			first <- err
		}()
		synctest.Wait()
		var crowd sync.WaitGroup
		for range 50 {
			crowd.Go(func() {
				if _, err := u.HeadManifest(t.Context(), "app", "1"); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		leave()
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Errorf("the one who left got %v, want its own end", err)
		}
		close(h.release)
		crowd.Wait()
		h.want(t, 1, 51, 50)
	})
}

// A realm that says nothing costs five seconds, and is told as what it is.
func TestSilentRealmIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &hub{answer: "%d", release: make(chan struct{})}
		u := newUpstream(h)
		began := time.Now()
		_, err := u.HeadManifest(t.Context(), "app", "1")
		if took := time.Since(began); err == nil || took != tokenTimeout {
			t.Errorf("error = %v after %v, want one after %v", err, took, tokenTimeout)
		}
	})
}

// The scope of a token is the pull of the repository in the path, whatever its
// name looks like.
func TestScopeOfAPath(t *testing.T) {
	for path, want := range map[string]string{
		"/v2/library/app/manifests/1":   "repository:library/app:pull",
		"/v2/app/blobs/sha256:00":       "repository:app:pull",
		"/v2/a/b/c/tags/list":           "repository:a/b/c:pull",
		"/v2/a/manifests/b/manifests/1": "repository:a/manifests/b:pull",
		"/v2/a/blobs/b/blobs/sha256:00": "repository:a/blobs/b:pull",
		"/v2/":                          "",
		"/token":                        "",
	} {
		if got := scopeOf(path); got != want {
			t.Errorf("scope of %s = %q, want %q", path, got, want)
		}
	}
}

// A realm may issue tokens for an upstream if it is the same host, of the same
// registrable domain, or listed; nothing else is sent a password.
func TestRealmsThatBelong(t *testing.T) {
	for _, c := range []struct {
		asked, realm string
		listed       []string
		says         string // "" when it is allowed
	}{
		{asked: "https://ghcr.io", realm: "https://ghcr.io/token"},
		{asked: "https://registry-1.docker.io", realm: "https://auth.docker.io/token"},
		{asked: "https://registry.example:5000", realm: "https://registry.example/token"},
		{asked: "http://127.0.0.1:5000", realm: "http://127.0.0.1:5001/token"},
		{asked: "http://registry.example", realm: "https://auth.example.org/token", listed: []string{"auth.example.org"}},
		{asked: "https://a.example", realm: "https://b.example:8443/token", listed: []string{"b.example:8443"}},

		{asked: "https://ghcr.io", realm: "https://evil.example/token", says: "does not belong"},
		{asked: "https://ghcr.io", realm: "https://ghcr.io.evil.example/token", says: "does not belong"},
		{asked: "https://ghcr.io", realm: "https://ghcr.io@evil.example/token", says: "does not belong"},
		{asked: "https://a.github.io", realm: "https://b.github.io/token", says: "does not belong"},
		{asked: "https://a.co.uk", realm: "https://b.co.uk/token", says: "does not belong"},
		{asked: "https://203.0.113.7", realm: "https://198.51.113.7/token", says: "does not belong"},
		{asked: "https://a.example", realm: "https://b.example:8443/token", listed: []string{"b.example:443"}, says: "does not belong"},
		{asked: "https://ghcr.io", realm: "http://ghcr.io/token", says: "is not https"},
		{asked: "https://ghcr.io", realm: "http://listed.example/token", listed: []string{"listed.example"}, says: "is not https"},
		{asked: "https://ghcr.io", realm: "/token", says: "is not an address"},
		{asked: "https://ghcr.io", realm: "", says: "is not an address"},
		{asked: "https://ghcr.io", realm: "file:///etc/passwd", says: "is not an address"},
		{asked: "https://ghcr.io", realm: "https://[::1/token", says: "is not an address"},
	} {
		asked, err := url.Parse(c.asked)
		if err != nil {
			t.Fatal(err)
		}
		u, err := (&authTransport{realms: c.listed}).checkRealm(asked, c.realm)
		var e *Error
		switch {
		case c.says == "" && (err != nil || u.String() != c.realm):
			t.Errorf("realm %s of %s is refused: %v", c.realm, c.asked, err)
		case c.says != "" && (!errors.As(err, &e) || !e.Nonsense || !strings.Contains(e.Err.Error(), c.says)):
			t.Errorf("realm %s of %s: error %v, want nonsense that says %q", c.realm, c.asked, err, c.says)
		}
	}
}

// Challenges are understood in the forms in which registries write them.
func TestChallengeForms(t *testing.T) {
	bearer := map[string]string{"realm": "https://auth.example/token", "service": "hub"}
	for _, c := range []struct {
		headers []string
		bearer  map[string]string
		basic   bool
	}{
		{[]string{`Bearer realm="https://auth.example/token",service="hub"`}, bearer, false},
		{[]string{`bearer Realm="https://auth.example/token", SERVICE="hub"`}, bearer, false},
		{[]string{`Bearer realm=https://auth.example/token,service=hub`}, bearer, false},
		{[]string{`Bearer service="hub",realm="https://auth.example/token",`}, bearer, false},
		{[]string{`Bearer scope="repository:a:pull,push",service="hub"`}, map[string]string{"scope": "repository:a:pull,push", "service": "hub"}, false},
		{[]string{`Negotiate`, `Bearer realm="https://auth.example/token",service="hub"`}, bearer, false},
		{[]string{`Negotiate, Bearer realm="https://auth.example/token",service="hub"`}, bearer, false},
		{[]string{`Basic realm="registry", Bearer realm="https://auth.example/token",service="hub"`}, bearer, true},
		{[]string{`Basic realm="registry"`, `Bearer realm="https://auth.example/token",service="hub"`}, bearer, true},
		{[]string{`Bearer realm="https://auth.example/token",service="hub", Basic realm="registry"`}, bearer, true},
		{[]string{`Basic realm="registry"`}, nil, true},
		{[]string{`BASIC`}, nil, true},
		{[]string{`Bearer realm="never closed`}, map[string]string{"realm": "never closed"}, false},
		{[]string{`Bearer nonsense`}, map[string]string{}, false},
		{[]string{`Digest realm="x"`}, nil, false},
		{[]string{``}, nil, false},
		{nil, nil, false},
	} {
		bearer, basic := parseChallenges(c.headers)
		if basic != c.basic || !reflect.DeepEqual(bearer, c.bearer) {
			t.Errorf("challenge %q is read as Bearer %v, Basic %t; want %v, %t", c.headers, bearer, basic, c.bearer, c.basic)
		}
	}
}

// No challenge makes its reader panic or go on for ever.
func FuzzParseChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://auth.example/token",service="hub",scope="repository:a:pull"`)
	f.Add(`Bearer realm=a,,=,"`)
	f.Add(`Basic realm="x", Bearer realm="y"`)
	f.Fuzz(func(t *testing.T, header string) {
		bearer, _ := parseChallenges([]string{header})
		for key := range bearer {
			if strings.ContainsAny(key, "=,") {
				t.Errorf("key %q", key)
			}
		}
	})
}

// What was refused is told from memory for a while, and then asked again: three
// seconds for what everybody may ask, half a minute for a password.
func TestRefusalIsBelievedForAWhile(t *testing.T) {
	for _, c := range []struct {
		credentials Credentials
		lasts       time.Duration
	}{{nil, refusedAnonymousFor}, {Static("a", "b"), refusedFor}} {
		synctest.Test(t, func(t *testing.T) {
			h := &hub{answer: `{"token":"bad-%d"}`}
			u := newUpstream(h)
			u.auth.keys.ask = c.credentials
			refused := func(remembered bool) {
				t.Helper()
				_, err := u.HeadManifest(t.Context(), "app", "1")
				var ue *Error
				if !errors.As(err, &ue) || ue.Status != 401 || ue.Remembered != remembered {
					t.Errorf("error = %+v, want a 401, remembered %t", err, remembered)
				}
			}
			refused(false)
			for range 5 {
				time.Sleep(c.lasts / 6)
				refused(true)
			}
			h.want(t, 1, 2, 0)
			time.Sleep(c.lasts / 3)
			h.answer = `{"token":"token-%d"}`
			if _, err := u.HeadManifest(t.Context(), "app", "1"); err != nil {
				t.Errorf("after %v: %v", c.lasts, err)
			}
			h.want(t, 2, 3, 1)
		})
	}
}
