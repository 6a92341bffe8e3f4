package upstream_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tidemark/proxy/upstream"
	"tidemark/proxy/upstream/upstreamtest"
)

const (
	user     = "reader"
	password = "correct-horse-battery-staple"
)

// withoutSecrets fails if the text of err would give away what we log in with.
func withoutSecrets(t *testing.T, err error) {
	t.Helper()
	for _, secret := range []string{password, "Bearer ", "Basic ", "token-", "secret-signature", "signature="} {
		if err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("error text %q contains %q", err, secret)
		}
	}
}

// wantAsked compares the requests of a registry with "status authorization",
// where only the scheme of the authorization counts.
func wantAsked(t *testing.T, reg *upstreamtest.Registry, want ...string) {
	t.Helper()
	var got []string
	for _, q := range reg.Requests() {
		scheme, _, _ := strings.Cut(q.Authorization, " ")
		if q.Status == 0 {
			q.Status = 200 // a list of tags says so by saying nothing
		}
		got = append(got, strings.TrimSpace(fmt.Sprint(q.Status, " ", scheme)))
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("upstream was asked %q, want %q", got, want)
	}
}

func head(t *testing.T, hub *upstream.Upstream, repository string) error {
	t.Helper()
	_, err := hub.HeadManifest(t.Context(), repository, "1")
	return err
}

// An upstream that asks for nothing is given nothing, even if we have a
// password for it.
func TestPasswordIsNotSentUnasked(t *testing.T) {
	reg := newRegistry(t)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	if err := head(t, open(upstream.Options{Credentials: upstream.Static(user, password)}, reg.URL()), "app"); err != nil {
		t.Error(err)
	}
	wantAsked(t, reg, "200")
}

// An upstream that asks for a password is given it, from then on at once.
func TestBasicPasswordIsSentOnceAskedFor(t *testing.T) {
	reg := newRegistry(t)
	reg.RequireBasic(user, password)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	hub := open(upstream.Options{Credentials: upstream.Static(user, password)}, reg.URL())
	for range 2 {
		if err := head(t, hub, "app"); err != nil {
			t.Error(err)
		}
	}
	wantAsked(t, reg, "401", "200 Basic", "200 Basic")
}

// A password that upstream does not take, or none at all, is upstream's 401,
// and does not make us try for ever.
func TestRefusedPasswordIs401(t *testing.T) {
	for _, c := range []struct {
		name     string
		username string
		want     []string
	}{
		{"wrong", "intruder", []string{"401", "401 Basic"}},
		{"none", "", []string{"401"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg := newRegistry(t)
			reg.RequireBasic(user, "another")
			hub := open(upstream.Options{Credentials: upstream.Static(c.username, password)}, reg.URL())
			for range 2 {
				err := head(t, hub, "app")
				if got := refusal(t, err).Status; got != 401 {
					t.Errorf("status = %d, want 401", got)
				}
				withoutSecrets(t, err)
			}
			wantAsked(t, reg, c.want...)
		})
	}
}

// A token is asked for once per repository, whatever is then asked of it, and
// with the scope of a pull.
func TestTokenIsKeptForItsRepository(t *testing.T) {
	reg := newRegistry(t)
	reg.RequireToken(user, password, time.Minute)
	img := upstreamtest.NewImage("layer")
	reg.Push("library/app", "1", img)
	reg.Push("library/other", "1", img)
	hub := open(upstream.Options{Credentials: upstream.Static(user, password)}, reg.URL())

	if err := head(t, hub, "library/app"); err != nil {
		t.Error(err)
	}
	if _, err := hub.GetManifest(t.Context(), "library/app", "1"); err != nil {
		t.Error(err)
	}
	if _, err := hub.HeadBlob(t.Context(), "library/app", img.Layers[0].Digest); err != nil {
		t.Error(err)
	}
	if _, _, err := hub.Tags(t.Context(), "library/app", nil); err != nil {
		t.Error(err)
	}
	wantAsked(t, reg, "401", "200 Bearer", "200 Bearer", "200 Bearer", "200 Bearer")
	if got := reg.Tokens(); got != 1 {
		t.Errorf("%d tokens for one repository, want 1", got)
	}
	if err := head(t, hub, "library/other"); err != nil {
		t.Error(err)
	}
	if got := reg.Tokens(); got != 2 {
		t.Errorf("%d tokens for two repositories, want 2", got)
	}
}

// A realm that gives out tokens that upstream refuses is not a loop.
func TestBadTokensAreNoLoop(t *testing.T) {
	reg := newRegistry(t)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	hub := open(upstream.Options{}, reg.URL())

	reg.RequireToken("", "", 0) // tokens that were never good
	if err := head(t, hub, "app"); refusal(t, err).Status != 401 {
		t.Errorf("error = %v, want upstream's 401", err)
	} else {
		withoutSecrets(t, err)
	}
	wantAsked(t, reg, "401", "401 Bearer")
}

// A realm that does not take the password says so in its own name: the 401 is
// the realm's, and upstream is not asked a second time.
func TestWrongPasswordIsTheRealmsRefusal(t *testing.T) {
	reg := newRegistry(t)
	reg.RequireToken(user, "another", time.Minute)
	hub := open(upstream.Options{Credentials: upstream.Static(user, password)}, reg.URL())

	err := head(t, hub, "app")
	if ue := refusal(t, err); ue.Status != 401 || !strings.Contains(ue.Error(), "token from "+reg.URL().Host+" refused") {
		t.Errorf("error = %v, want the realm's 401", ue)
	}
	withoutSecrets(t, err)
	wantAsked(t, reg, "401")
	if got := reg.Tokens(); got != 0 {
		t.Errorf("%d tokens were given, want 0", got)
	}
}

// newRealm starts a token realm and counts the requests that reach it.
func newRealm(t *testing.T, answer http.HandlerFunc) (*url.URL, *atomic.Int32) {
	asked := new(atomic.Int32)
	addr := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		answer(w, r)
	})
	return addr, asked
}

func giveToken(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"token":"token-1"}`) }

// challenging is a registry that wants token-1 from realm.
func challenging(realm string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer token-1" {
			w.Header().Set("Www-Authenticate", `Bearer realm="`+realm+`",service="hub"`)
			w.WriteHeader(http.StatusUnauthorized)
		}
	}
}

// A realm at another domain gets neither the password nor any request, unless
// the configuration lists it.
func TestForeignRealmIsAskedOnlyIfListed(t *testing.T) {
	addr, asked := newRealm(t, giveToken)
	elsewhere := "localhost:" + addr.Port() // 127.0.0.1 is the upstream; a name is another domain
	hubAt := newServer(t, challenging("http://"+elsewhere+"/token"))

	err := head(t, open(upstream.Options{Credentials: upstream.Static(user, password)}, hubAt), "app")
	if ue := refusal(t, err); !ue.Nonsense || ue.Status != 0 || !strings.Contains(ue.Error(), elsewhere+" does not belong to the upstream") || !strings.Contains(ue.Error(), "token_realms") {
		t.Errorf("error = %v, want nonsense that names the realm and token_realms", ue)
	}
	withoutSecrets(t, err)
	if got := asked.Load(); got != 0 {
		t.Fatalf("the foreign realm was asked %d times, want 0", got)
	}

	for i, listed := range []string{"localhost", elsewhere} {
		hub := open(upstream.Options{Credentials: upstream.Static(user, password), TokenRealms: []string{listed}}, hubAt)
		if err := head(t, hub, "app"); err != nil {
			t.Errorf("realm listed as %q: %v", listed, err)
		}
		if got := asked.Load(); got != int32(i+1) {
			t.Errorf("realm listed as %q was asked %d times in all, want %d", listed, got, i+1)
		}
	}
}

// A password that upstream itself would get over https is never sent in clear.
func TestRealmWithoutTLSIsRefused(t *testing.T) {
	addr, asked := newRealm(t, giveToken)
	srv := httptest.NewTLSServer(challenging(addr.String()))
	t.Cleanup(srv.Close)
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	hub := open(upstream.Options{Credentials: upstream.Static(user, password), RootCAs: roots}, parse(t, srv.URL))

	err := head(t, hub, "app")
	if ue := refusal(t, err); !ue.Nonsense || !strings.Contains(ue.Error(), "is not https") {
		t.Errorf("error = %v, want nonsense about a realm without https", ue)
	}
	if got := asked.Load(); got != 0 {
		t.Errorf("the realm was asked %d times, want 0", got)
	}
}

// Credentials go to the realm that was checked and no further.
func TestRealmThatRedirectsIsNotFollowed(t *testing.T) {
	elsewhere, asked := newRealm(t, giveToken)
	realm, _ := newRealm(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, elsewhere.String(), http.StatusFound)
	})
	hub := open(upstream.Options{Credentials: upstream.Static(user, password)}, newServer(t, challenging(realm.String())))

	if err := head(t, hub, "app"); err == nil {
		t.Error("a redirected realm gave a token")
	}
	if got := asked.Load(); got != 0 {
		t.Errorf("what the realm redirected to was asked %d times, want 0", got)
	}
}

// A realm that sends something else than a token is told as nonsense, and one
// that sends too much of it is cut off.
func TestRealmsNonsense(t *testing.T) {
	for _, c := range []struct {
		name, says string
		answer     http.HandlerFunc
	}{
		{"endless", "larger than 65536 bytes", func(w http.ResponseWriter, _ *http.Request) {
			for {
				if _, err := io.WriteString(w, `{"token":"token-2"}                             `); err != nil {
					return
				}
			}
		}},
		{"oversized token", "larger than 65536 bytes", func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, `{"token":"token-%s"}`, strings.Repeat("2", 64<<10))
		}},
		{"html", "invalid character", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") }},
		{"no token", "empty", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{}`) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			realm, asked := newRealm(t, c.answer)
			hub := open(upstream.Options{Credentials: upstream.Static(user, password)}, newServer(t, challenging(realm.String())))
			err := head(t, hub, "app")
			if ue := refusal(t, err); !ue.Nonsense || !strings.Contains(ue.Error(), "token from "+realm.Host) || !strings.Contains(ue.Error(), c.says) {
				t.Errorf("error = %v, want nonsense of the realm that says %q", ue, c.says)
			}
			withoutSecrets(t, err)
			if got := asked.Load(); got != 1 {
				t.Errorf("the realm was asked %d times, want 1", got)
			}
		})
	}
}

// The older name of a token is understood, as realms for OAuth use it.
func TestAccessTokenIsAToken(t *testing.T) {
	realm, _ := newRealm(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"access_token":"token-1"}`) })
	if err := head(t, open(upstream.Options{}, newServer(t, challenging(realm.String()))), "app"); err != nil {
		t.Error(err)
	}
}

// The realm is asked for the service and scope of the pull, with the password
// and without anything of the request it is for.
func TestRealmIsAskedAsSpecified(t *testing.T) {
	asked := make(chan *http.Request, 1)
	realm, _ := newRealm(t, func(w http.ResponseWriter, r *http.Request) {
		asked <- r.Clone(context.Background())
		giveToken(w, r)
	})
	hub := open(upstream.Options{Credentials: upstream.Static(user, password)}, newServer(t, challenging(realm.String()+"/token?kept=yes")))
	if err := head(t, hub, "library/app"); err != nil {
		t.Fatal(err)
	}
	got := <-asked
	want := url.Values{"service": {"hub"}, "scope": {"repository:library/app:pull"}, "kept": {"yes"}}
	if q := got.URL.Query(); q.Encode() != want.Encode() {
		t.Errorf("the realm was asked with %v, want %v", q, want)
	}
	if u, p, _ := got.BasicAuth(); u != user || p != password {
		t.Error("the realm was asked without the password")
	}
}

// A realm that is down is upstream's silence, and says so without secrets.
func TestRealmThatIsDownIsSilence(t *testing.T) {
	down := httptest.NewServer(nil)
	hub := open(upstream.Options{Credentials: upstream.Static(user, password)}, newServer(t, challenging(down.URL+"/token")))
	down.Close() // not before: the registry would get its port
	err := head(t, hub, "app")
	if ue := refusal(t, err); ue.Status != 0 || ue.Nonsense || !strings.Contains(ue.Error(), "token from ") {
		t.Errorf("error = %v, want the silence of the realm", ue)
	}
	withoutSecrets(t, err)
}

// A registry, or a realm, that says 401 to a good user about one repository refuses
// that one and no other; that the password is wrong is told by all of them.
func TestRefusalOfOneRepositoryCostsNoOther(t *testing.T) {
	for _, bearer := range []bool{false, true} {
		var srv *httptest.Server
		good := func(r *http.Request) bool { u, p, _ := r.BasicAuth(); return u == user && p == password }
		srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			forbidden := strings.Contains(r.URL.String(), "forbidden")
			switch {
			case r.URL.Path == "/token" && (!good(r) || forbidden), !bearer && (!good(r) || forbidden), bearer && r.URL.Path != "/token" && r.Header.Get("Authorization") == "":
				w.Header().Set("Www-Authenticate", `Basic realm="x"`)
				if bearer {
					w.Header().Set("Www-Authenticate", `Bearer realm="`+srv.URL+`/token",service="x"`)
				}
				w.WriteHeader(http.StatusUnauthorized)
			case r.URL.Path == "/token":
				_, _ = w.Write([]byte(`{"token":"t"}`))
			}
		}))
		t.Cleanup(srv.Close)
		at := parse(t, srv.URL)
		hub := open(upstream.Options{Credentials: upstream.Static(user, password)}, at)
		for i, repo := range []string{"a", "forbidden", "a", "b", "forbidden", "c"} {
			err := head(t, hub, repo)
			if refused := err != nil; refused != (repo == "forbidden") {
				t.Errorf("bearer %t: question %d, about %s: %v", bearer, i, repo, err)
			}
		}
	}
}
