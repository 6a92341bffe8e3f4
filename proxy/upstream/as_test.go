package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/proxy/upstream"
	"tidemark/proxy/upstream/upstreamtest"
)

// What the clients of these tests send, and what must not be seen of it.
const (
	anna      = "Bearer token-of-anna"
	ben       = "Basic dG9rZW4tb2YtYmVu"
	benSecret = "dG9rZW4tb2YtYmVu"
)

// counted are the configuration's credentials, and how often they were asked for.
func counted(n *atomic.Int32) upstream.Credentials {
	return func(context.Context) (upstream.Credential, error) {
		n.Add(1)
		return upstream.Credential{Username: user, Password: password}, nil
	}
}

// authorizations are what a registry was sent, in order.
func authorizations(reg *upstreamtest.Registry) (sent []string) {
	for _, q := range reg.Requests() {
		sent = append(sent, q.Authorization)
	}
	return sent
}

// A client's Authorization reaches the endpoints as the client wrote it, whatever
// its scheme, with every question that can be asked.
func TestClientIsAskedForWithItsOwnAuthorization(t *testing.T) {
	for _, sent := range []string{anna, ben, "Negotiate YII=", "bearer   odd  spacing", "x"} {
		reg := newRegistry(t)
		img := upstreamtest.NewImage("layer")
		reg.PushPrivate("app", "1", img, sent)
		reg.Refer("app", img.Manifest.Digest, "text/plain", upstreamtest.NewImage("sbom").Manifest)
		hub := open(upstream.Options{Credentials: upstream.Static(user, password)}, reg.URL()).As(sent)

		_, headErr := hub.HeadManifest(t.Context(), "app", "1")
		_, getErr := hub.GetManifest(t.Context(), "app", "1")
		_, sizeErr := hub.HeadBlob(t.Context(), "app", img.Layers[0].Digest)
		blob, blobErr := hub.GetBlob(t.Context(), "app", img.Layers[0].Digest, 0, -1)
		if blobErr == nil {
			blob.Body.Close()
		}
		_, _, tagsErr := hub.Tags(t.Context(), "app", nil)
		_, refErr := hub.Referrers(t.Context(), "app", img.Manifest.Digest)
		if err := errors.Join(headErr, getErr, sizeErr, blobErr, tagsErr, refErr, hub.Ping(t.Context())); err != nil {
			t.Errorf("as %q: %v", sent, err)
		}
		for i, got := range authorizations(reg) {
			if got != sent {
				t.Errorf("request %d was sent %q, want %q", i, got, sent)
			}
		}
	}
}

// Where an endpoint redirects to gets no client's Authorization, and neither does
// a token realm: it is for the client to go there.
func TestClientsAuthorizationGoesNowhereElse(t *testing.T) {
	reg := newRegistry(t)
	img := upstreamtest.NewImage("0123456789")
	reg.PushPrivate("app", "1", img, anna)
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Redirect, Path: "/blobs/"})
	hub := open(upstream.Options{}, reg.URL()).As(anna)
	for range 2 {
		blob, err := hub.GetBlob(t.Context(), "app", img.Layers[0].Digest, 4, -1)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(blob.Body); err != nil || string(got) != "456789" {
			t.Errorf("blob = %q, %v; want 456789", got, err)
		}
		blob.Body.Close()
	}
	if got := len(reg.Requests()); got != 4 {
		t.Errorf("%d requests, want 2 to upstream and 2 to where it redirects", got)
	}
	for _, q := range reg.Requests() {
		want := anna
		if q.Host != reg.URL().Host {
			want = ""
		}
		if q.Authorization != want {
			t.Errorf("%s got the Authorization %q, want %q", q.Host, q.Authorization, want)
		}
	}

	realm, asked := newRealm(t, giveToken)
	err := head(t, open(upstream.Options{Credentials: upstream.Static(user, password)}, newServer(t, challenging(realm.String()))).As(anna), "app")
	if ue := refusal(t, err); ue.Status != 401 {
		t.Errorf("error = %v, want upstream's 401", err)
	}
	withoutSecrets(t, err)
	if got := asked.Load(); got != 0 {
		t.Errorf("the realm was asked %d times for a client, want 0", got)
	}
}

// Two endpoints of one upstream both are the upstream: a redirect from one to the
// other keeps the client's Authorization.
func TestClientsAuthorizationIsForAllEndpoints(t *testing.T) {
	second := newRegistry(t)
	second.PushPrivate("app", "1", upstreamtest.NewImage("layer"), anna)
	first := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, second.URL().String()+r.URL.Path, http.StatusTemporaryRedirect)
	})
	if err := head(t, open(upstream.Options{}, first, second.URL()).As(anna), "app"); err != nil {
		t.Error(err)
	}
}

// The configuration's credentials are not even asked for when a client is let in
// or refused, and what they have got already, a token or that Basic is wanted, is
// not used for it.
func TestClientsNeverUseTheConfigurationsCredentials(t *testing.T) {
	for _, c := range []struct {
		name    string
		require func(*upstreamtest.Registry)
	}{
		{"basic", func(r *upstreamtest.Registry) { r.RequireBasic(user, password) }},
		{"bearer", func(r *upstreamtest.Registry) { r.RequireToken(user, password, time.Minute) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg := newRegistry(t)
			reg.Push("app", "1", upstreamtest.NewImage("layer"))
			c.require(reg)
			asked := new(atomic.Int32)
			hub := open(upstream.Options{Credentials: counted(asked)}, reg.URL())
			refused := func() {
				t.Helper()
				for _, who := range []string{"", anna, ben} {
					reg.Reset()
					err := head(t, hub.As(who), "app")
					if ue := refusal(t, err); ue.Status != 401 || ue.Remembered || len(ue.Challenge) != 1 {
						t.Errorf("as %q: %+v, want upstream's 401 with its challenge", who, ue)
					}
					withoutSecrets(t, err)
					if got := authorizations(reg); !slices.Equal(got, []string{who}) {
						t.Errorf("as %q upstream was sent %q", who, got)
					}
					if got := reg.Tokens(); got != 0 {
						t.Errorf("as %q %d tokens were fetched, want 0", who, got)
					}
				}
			}
			refused()
			if got := asked.Load(); got != 0 {
				t.Errorf("the configuration's credentials were asked for %d times, want 0", got)
			}
			if err := head(t, hub, "app"); err != nil {
				t.Fatal(err)
			}
			refused()
			if err := head(t, hub, "app"); err != nil {
				t.Errorf("the configuration itself, afterwards: %v", err)
			}
		})
	}
}

// A client that is let in has nothing to do with what the configuration was
// refused, and the other way round.
func TestRefusedConfigurationDoesNotKeepClientsOut(t *testing.T) {
	reg := newRegistry(t)
	reg.RequireToken(user, "another", time.Minute)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	hub := open(upstream.Options{Credentials: upstream.Static(user, password)}, reg.URL())
	if ue := refusal(t, head(t, hub, "app")); ue.Status != 401 {
		t.Fatalf("error = %v, want 401", ue)
	}
	good := fmt.Sprintf("Bearer token-%d", time.Now().Add(time.Minute).UnixNano())
	if err := head(t, hub.As(good), "app"); err != nil {
		t.Errorf("a client with a good token: %v", err)
	}
}

// The challenge of a 401 is told to the client with what was understood of it, and
// nothing else.
func TestChallengeIsRebuilt(t *testing.T) {
	for _, c := range []struct {
		name    string
		headers []string // HERE is the upstream's own address
		want    []string
	}{
		{"token", []string{`Bearer realm="HERE/token",service="hub",scope="repository:app:pull,push"`}, []string{`Bearer realm="HERE/token",service="hub",scope="repository:app:pull,push"`}},
		{"other order and case", []string{`bearer SCOPE="a" , Service=hub,realm="HERE/token"`}, []string{`Bearer realm="HERE/token",service="hub",scope="a"`}},
		{"what nobody needs", []string{`Bearer realm="HERE/token",charset="UTF-8",error_uri="https://evil.example/",x=y`}, []string{`Bearer realm="HERE/token"`}},
		{"a password", []string{`Basic realm="send it to https://evil.example/"`}, []string{`Basic realm="HOST"`}},
		{"a password or a token", []string{`Basic realm="x"`, `Bearer realm="HERE/token"`}, []string{`Bearer realm="HERE/token"`, `Basic realm="HOST"`}},
		{"what cannot be answered", []string{`Negotiate`, `Digest realm="x",nonce="y"`}, nil},
		{"nothing", nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var here *url.URL
			here = newServer(t, func(w http.ResponseWriter, _ *http.Request) {
				for _, h := range c.headers {
					w.Header().Add("Www-Authenticate", strings.ReplaceAll(h, "HERE", here.String()))
				}
				w.WriteHeader(http.StatusUnauthorized)
			})
			var want []string
			for _, w := range c.want {
				want = append(want, strings.NewReplacer("HERE", here.String(), "HOST", here.Host).Replace(w))
			}
			ue := refusal(t, head(t, open(upstream.Options{}, here).As(anna), "app"))
			if ue.Status != 401 || !slices.Equal(ue.Challenge, want) {
				t.Errorf("status %d, challenge %q; want 401, %q", ue.Status, ue.Challenge, want)
			}
			if ue.Condition() != "" {
				t.Errorf("a client's 401 says %q of upstream's condition, want nothing", ue.Condition())
			}
		})
	}
}

// lenient is how a client may read a challenge that does not parse it, but looks
// for what it needs.
var lenient = regexp.MustCompile(`(\w+)="([^"]*)"`)

// A client sends its password to the realm that it reads, and clients read
// differently. What upstream wrote into another parameter does not become a second
// realm on the way.
func TestChallengeHasOneRealmHoweverItIsRead(t *testing.T) {
	const bad = "https://evil.example/token"
	for _, challenge := range []string{
		`Bearer realm="HERE/token",service=a" realm="` + bad,
		`Bearer realm="HERE/token",service=a" realm="` + bad + `"`,
		`Bearer realm="HERE/token",scope=a" realm="` + bad + `",service="b"`,
		`Bearer realm="HERE/token",error=x" realm="` + bad,
		`Bearer realm="HERE/token",service="x\",scope=" realm=\"` + bad,
		`Bearer realm="HERE/token",service=x",scope=",realm=` + bad + `,"`,
		`Bearer realm=HERE/token" realm="` + bad,
	} {
		var here *url.URL
		here = newServer(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Www-Authenticate", strings.ReplaceAll(challenge, "HERE", here.String()))
			w.WriteHeader(http.StatusUnauthorized)
		})
		ue := refusal(t, head(t, open(upstream.Options{}, here).As(anna), "app"))
		for _, told := range ue.Challenge {
			for _, kv := range lenient.FindAllStringSubmatch(told, -1) {
				if kv[1] == "realm" && !strings.HasPrefix(kv[2], here.String()+"/") && kv[2] != here.Host {
					t.Errorf("upstream's %s\nis told as %s\nin which a client may read the realm %q", challenge, told, kv[2])
				}
			}
			if strings.Count(told, `"`)%2 != 0 || strings.ContainsAny(told, "\\\r\n") {
				t.Errorf("upstream's %s\nis told as %s", challenge, told)
			}
		}
	}
}

// A realm that does not belong to the upstream is not told: the client would send
// its password there.
func TestForeignRealmIsNotTold(t *testing.T) {
	for _, realm := range []string{
		"https://evil.example/token", "http://localhost:1/token", "//evil.example", "/token", "", "ftp://127.0.0.1/",
		"http://127.0.0.1@evil.example/token", "http://127.0.0.1.evil.example/token", `http://127.0.0.1\@evil.example/token`,
	} {
		asked, here := new(atomic.Int32), newServer(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Www-Authenticate", `Bearer realm="`+realm+`"`)
			w.Header().Add("Www-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		})
		ue := refusal(t, head(t, open(upstream.Options{Credentials: counted(asked)}, here).As(anna), "app"))
		if !ue.Nonsense || ue.Status != 0 || ue.Challenge != nil {
			t.Errorf("realm %q: %+v, want nonsense without a challenge", realm, ue)
		}
		if strings.Contains(ue.Error(), ": :") {
			t.Errorf("realm %q: error = %q, which says nothing between two colons", realm, ue)
		}
		if asked.Load() != 0 {
			t.Errorf("realm %q: the configuration's credentials were asked for", realm)
		}
	}
	// What the configuration lists belongs to it.
	here := newServer(t, challenging("http://localhost:1/token"))
	if ue := refusal(t, head(t, open(upstream.Options{TokenRealms: []string{"localhost"}}, here).As(""), "app")); len(ue.Challenge) != 1 {
		t.Errorf("a realm that is listed: %+v, want its challenge", ue)
	}
}

// Who is asked only because upstream redirected there has no password to ask for.
func TestChallengeOfARedirectIsNotTold(t *testing.T) {
	elsewhere := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Errorf("where upstream redirected to got %q", r.Header.Get("Authorization"))
		}
		w.Header().Set("Www-Authenticate", `Basic realm="give it to me"`)
		w.WriteHeader(http.StatusUnauthorized)
	})
	here := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, elsewhere.String(), http.StatusFound)
	})
	for _, who := range []string{"", anna} {
		if ue := refusal(t, head(t, open(upstream.Options{}, here).As(who), "app")); !ue.Nonsense || ue.Status != 0 || ue.Challenge != nil {
			t.Errorf("as %q: %+v, want nonsense without a challenge", who, ue)
		}
	}
}

// What upstream refuses one client it has not refused another, nor the
// configuration; each is asked for, and upstream stays in good health.
func TestRefusalOfAClientIsItsOwn(t *testing.T) {
	for _, status := range []int64{401, 403, 404, 429} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			reg := newRegistry(t)
			reg.Push("app", "1", upstreamtest.NewImage("layer"))
			hub := open(upstream.Options{}, reg.URL())
			for round := range 4 { // as many as would open a breaker
				reg.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: status, Times: 1, Header: http.Header{"Retry-After": {"3600"}}})
				err := head(t, hub.As(fmt.Sprint("Bearer ", round)), "app")
				ue := refusal(t, err)
				if ue.Status != int(status) || ue.Remembered || ue.Caller != hub.As(fmt.Sprint("Bearer ", round)).Caller() {
					t.Fatalf("client %d: %+v, want its own %d", round, ue, status)
				}
				withoutSecrets(t, err)
				if c := ue.Condition(); c != "" {
					t.Errorf("it says %q of upstream's condition, want nothing", c)
				}
				if h := hub.Health(); !h.Healthy || h.LastError != "" || h.RateLimitRemaining != -1 {
					t.Errorf("health = %+v after a client's %d, want good", h, status)
				}
			}
			reg.Reset()
			for _, who := range []string{"", anna, ben} {
				if err := head(t, hub.As(who), "app"); err != nil {
					t.Errorf("as %q: %v", who, err)
				}
			}
			if err := head(t, hub, "app"); err != nil {
				t.Errorf("the configuration: %v", err)
			}
			wantAsked(t, reg, "200", "200 Bearer", "200 Basic", "200")
		})
	}
}

// A client's own 404 is believed for a while, for this client.
func TestMissingIsRememberedForEachClient(t *testing.T) {
	reg := newRegistry(t)
	hub := open(upstream.Options{}, reg.URL())
	for range 3 {
		for _, u := range []*upstream.Upstream{hub, hub.As(""), hub.As(anna), hub.As(ben)} {
			if err := head(t, u, "app"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("error = %v, want a 404", err)
			}
		}
	}
	wantAsked(t, reg, "404", "404", "404 Bearer", "404 Basic")
	hub.As(anna).Forget("app", "1")
	for _, u := range []*upstream.Upstream{hub, hub.As(""), hub.As(anna), hub.As(ben)} {
		_ = head(t, u, "app")
	}
	wantAsked(t, reg, "404", "404", "404 Bearer", "404 Basic", "404 Bearer")
}

// The configuration's rate limit is not the clients', who ask on; and what clients
// are told does not end it.
func TestRateLimitOfTheConfigurationIsItsOwn(t *testing.T) {
	reg := newRegistry(t)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 429, Times: 1, Header: http.Header{"Retry-After": {"3600"}}})
	hub := open(upstream.Options{}, reg.URL())
	if ue := refusal(t, head(t, hub, "app")); ue.Status != 429 {
		t.Fatalf("error = %v, want 429", ue)
	}
	for range 3 {
		if err := head(t, hub.As(anna), "app"); err != nil {
			t.Errorf("a client: %v", err)
		}
		_, _ = hub.As(ben).HeadManifest(t.Context(), "app", "absent")
		if ue := refusal(t, head(t, hub, "app")); ue.Status != 429 || ue.RetryAfter < 59*time.Minute {
			t.Errorf("the configuration: %v, to come back in %v; want its 429 for an hour", ue, ue.RetryAfter)
		}
	}
	if got := reg.Count("HEAD", "/manifests/1"); got != 4 {
		t.Errorf("upstream was asked %d times, want once for the configuration and 3 times for a client", got)
	}
}

// As long as the configuration is not to ask, the upstream's health says so: that
// clients with rights of their own are answered does not help the others.
func TestHealthTellsTheConfigurationsLimitWhileClientsAreAnswered(t *testing.T) {
	reg := newRegistry(t)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 429, Times: 1, Header: http.Header{"Retry-After": {"3600"}}})
	hub := open(upstream.Options{}, reg.URL())
	_ = head(t, hub, "app")
	if h := hub.Health(); h.Healthy {
		t.Fatalf("health = %+v after 429, want not", h)
	}
	_ = head(t, hub.As(anna), "absent")
	if h := hub.Health(); h.Healthy {
		t.Errorf("health = %+v once a client was told 404, want the configuration's 429", h)
	}
}

// An upstream in trouble is in trouble for all: clients are spared it as the
// configuration is.
func TestTroubleIsEverybodys(t *testing.T) {
	reg := newRegistry(t)
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 503})
	hub := open(upstream.Options{}, reg.URL())
	for i := range 3 {
		if ue := refusal(t, head(t, hub.As(fmt.Sprint("Bearer ", i)), "app")); ue.Status != 503 || ue.Condition() != "upstream.degraded" {
			t.Fatalf("error = %v, which says %q; want 503, degraded", ue, ue.Condition())
		}
	}
	if h := hub.Health(); h.Healthy {
		t.Error("upstream is in good health, want not")
	}
	for _, u := range []*upstream.Upstream{hub, hub.As(anna)} {
		if ue := refusal(t, head(t, u, "app")); ue.Status != 503 {
			t.Errorf("error = %v, want 503", ue)
		}
	}
	if got := reg.Count("", ""); got != 3 {
		t.Errorf("upstream was asked %d times, want 3", got)
	}
}

// A client's name is the same for the same Authorization and another for another,
// is never that of the configuration, and is made of nothing that could be read.
func TestCallerNamesWhoseRightsAreUsed(t *testing.T) {
	hub := open(upstream.Options{}, parse(t, "http://127.0.0.1:1"))
	if got := hub.Caller(); got != "" {
		t.Errorf("the configuration is called %q, want nothing", got)
	}
	names := make(map[string]string)
	for _, auth := range []string{"", " ", anna, ben, anna + " ", strings.ToLower(anna), strings.Repeat("x", 100_000)} {
		name := hub.As(auth).Caller()
		if other, taken := names[name]; taken {
			t.Errorf("%.50q and %.50q have one name", auth, other)
		}
		names[name] = auth
		if again := hub.As(auth).Caller(); again != name {
			t.Errorf("%.50q has two names", auth)
		}
		if through := hub.As(anna).As(auth).Caller(); through != name {
			t.Errorf("%.50q has another name through another client", auth)
		}
		if name == "" || len(name) > 64 {
			t.Errorf("%.50q has a name of %d bytes", auth, len(name))
		}
	}
	for name := range maps.Keys(names) {
		for _, secret := range []string{"token-of-anna", benSecret, "Bearer"} {
			if strings.Contains(name, secret) {
				t.Errorf("the name %q tells %s", name, secret)
			}
		}
	}
	if a, b := hub.As(anna).Identity(), hub.As(ben).Identity(); a != "client" || b != "client" {
		t.Errorf("clients have the identities %q and %q, want client", a, b)
	}
	if other := open(upstream.Options{}, parse(t, "http://127.0.0.1:1")); hub.As(anna).Caller() == other.As(anna).Caller() {
		t.Error("the name can be made by somebody else who has the Authorization")
	}
}

// A sent is one request that a push made.
type sent struct {
	method, uri, body string
	length            int64
	header            http.Header
}

// receiving answers pushes with a status, and keeps them.
func receiving(t *testing.T, status int, head http.Header) (*url.URL, chan sent) {
	got := make(chan sent, 100)
	return newServer(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- sent{r.Method, r.RequestURI, string(body), r.ContentLength, r.Header.Clone()}
		maps.Copy(w.Header(), head)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, "said upstream")
	}), got
}

// A push reaches upstream as it was made: method, path, query, what was said of the
// body and the body itself, with the client's Authorization or none.
func TestPushIsPassedOn(t *testing.T) {
	for _, c := range []upstream.Pushed{
		{Method: "POST", Path: "/v2/app/blobs/uploads/", Query: url.Values{"mount": {"sha256:1"}, "from": {"other/app"}}},
		{Method: "PATCH", Path: "/v2/app/blobs/uploads/1", Header: http.Header{"Content-Range": {"0-3"}, "Content-Type": {"application/octet-stream"}}, Body: strings.NewReader("data"), Length: 4},
		{Method: "PATCH", Path: "/v2/app/blobs/uploads/1", Query: url.Values{"_state": {"a+b/c=&d"}}, Body: io.MultiReader(strings.NewReader("da"), strings.NewReader("ta")), Length: -1},
		{Method: "PUT", Path: "/v2/app/blobs/uploads/a%2Fb%3D", Query: url.Values{"digest": {"sha256:2"}}, Body: io.MultiReader(strings.NewReader("")), Length: 0},
		{Method: "PUT", Path: "/v2/app/manifests/1", Header: http.Header{"Content-Type": {"application/vnd.oci.image.manifest.v1+json"}}, Body: strings.NewReader("{}"), Length: 2},
		{Method: "DELETE", Path: "/v2/app/manifests/1"},
	} {
		t.Run(c.Method+" "+c.Path, func(t *testing.T) {
			for _, who := range []string{"", anna} {
				here, got := receiving(t, http.StatusAccepted, http.Header{"Location": {"/v2/app/blobs/uploads/next"}, "Range": {"0-3"}})
				asked := new(atomic.Int32)
				hub := open(upstream.Options{Credentials: counted(asked)}, parse(t, here.String()+"/base"))
				p := c
				body := ""
				if c.Body != nil {
					all, _ := io.ReadAll(c.Body)
					body = string(all)
					p.Body, c.Body = io.MultiReader(strings.NewReader(body)), strings.NewReader(body)
				}
				before := fmt.Sprint(p.Header, p.Query)
				resp, err := hub.As(who).Push(t.Context(), &p)
				if err != nil {
					t.Fatal(err)
				}
				answer, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				if resp.StatusCode != http.StatusAccepted || string(answer) != "said upstream" || resp.Header.Get("Location") == "" || resp.Header.Get("Range") != "0-3" {
					t.Errorf("answer = %d %v %q, want upstream's", resp.StatusCode, resp.Header, answer)
				}
				g := <-got
				uri := "/base" + p.Path
				if q := p.Query.Encode(); q != "" {
					uri += "?" + q
				}
				if g.method != p.Method || g.uri != uri || g.body != body || g.length != p.Length {
					t.Errorf("upstream got %s %s with %q of %d, want %s %s with %q of %d", g.method, g.uri, g.body, g.length, p.Method, uri, body, p.Length)
				}
				for k, v := range p.Header {
					if !slices.Equal(g.header[k], v) {
						t.Errorf("upstream got %s %q, want %q", k, g.header[k], v)
					}
				}
				if a := g.header.Get("Authorization"); a != who {
					t.Errorf("upstream got the Authorization %q, want %q", a, who)
				}
				if g.header.Get("User-Agent") != "tidemark/test" {
					t.Errorf("upstream got the User-Agent %q", g.header.Get("User-Agent"))
				}
				if after := fmt.Sprint(p.Header, p.Query); after != before {
					t.Errorf("the push was changed from %s to %s", before, after)
				}
				if asked.Load() != 0 {
					t.Error("the configuration's credentials were asked for")
				}
			}
		})
	}
}

// A layer goes through as it comes, however large it is and whether or not its
// length is known: upstream has its first bytes before the last exist, and memory
// holds a little of it.
func TestPushIsNotHeldInMemory(t *testing.T) {
	const chunk, chunks = 1 << 20, 64
	for _, length := range []int64{-1, chunk * chunks} {
		begun, sum := make(chan struct{}), make(chan digest.Digest, 1)
		here := newServer(t, func(w http.ResponseWriter, r *http.Request) {
			d := digest.SHA256.Digester()
			_, _ = io.CopyN(d.Hash(), r.Body, chunk/2)
			close(begun)
			_, _ = io.Copy(d.Hash(), r.Body)
			sum <- d.Digest()
			w.WriteHeader(http.StatusCreated)
		})
		hub := open(upstream.Options{HeaderTimeout: 20 * time.Millisecond}, here) // a push has more time than a pull
		part := bytes.Repeat([]byte("0123456789abcdef"), chunk/16)
		want := digest.SHA256.Digester()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		pr, pw := io.Pipe()
		go func() {
			defer pw.Close()
			for i := range chunks {
				if i == 1 {
					select {
					case <-begun:
					case <-time.After(10 * time.Second):
						pw.CloseWithError(errors.New("upstream got nothing while the rest was not there yet"))
						return
					}
				}
				part[0] = byte(i)
				_, _ = want.Hash().Write(part)
				if _, err := pw.Write(part); err != nil {
					return
				}
			}
		}()
		resp, err := hub.As(anna).Push(t.Context(), &upstream.Pushed{Method: "PATCH", Path: "/v2/app/blobs/uploads/1", Body: pr, Length: length})
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		runtime.ReadMemStats(&after)
		if got := <-sum; resp.StatusCode != http.StatusCreated || got != want.Digest() {
			t.Errorf("upstream got %s and answered %d, want %s and 201", got, resp.StatusCode, want.Digest())
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > 16<<20 {
			t.Errorf("%d MiB of memory were taken for a layer of %d MiB", used>>20, chunk*chunks>>20)
		}
	}
}

// What was sent cannot be sent again: a redirect is an answer, and nobody is asked
// where it leads.
func TestPushFollowsNoRedirect(t *testing.T) {
	asked := new(atomic.Int32)
	elsewhere := newServer(t, func(http.ResponseWriter, *http.Request) { asked.Add(1) })
	for _, status := range []int{301, 302, 303, 307, 308} {
		here, _ := receiving(t, status, http.Header{"Location": {elsewhere.String()}})
		resp, err := open(upstream.Options{}, here).As(anna).Push(t.Context(), &upstream.Pushed{Method: "PUT", Path: "/v2/app/manifests/1", Body: strings.NewReader("{}"), Length: 2})
		if err != nil || resp.StatusCode != status || resp.Header.Get("Location") != elsewhere.String() {
			t.Errorf("%d: %v, %v; want it as the answer", status, resp, err)
		}
		if err == nil {
			resp.Body.Close()
		}
	}
	if got := asked.Load(); got != 0 {
		t.Errorf("where upstream redirected to was asked %d times, want 0", got)
	}
}

// A push that upstream refuses for who makes it, or for its own trouble, is an
// error; every other answer is the client's to read.
func TestPushErrorsAndAnswers(t *testing.T) {
	for status, isError := range map[int]bool{
		200: false, 201: false, 202: false, 204: false, 400: false, 404: false, 405: false, 409: false, 413: false, 416: false,
		401: true, 403: true, 429: true, 500: true, 502: true, 503: true,
	} {
		here, _ := receiving(t, status, http.Header{"Retry-After": {"60"}, "Www-Authenticate": {`Basic realm="x"`}})
		hub := open(upstream.Options{}, here)
		resp, err := hub.As(anna).Push(t.Context(), &upstream.Pushed{Method: "POST", Path: "/v2/app/blobs/uploads/"})
		if err == nil {
			resp.Body.Close()
			if isError || resp.StatusCode != status {
				t.Errorf("%d is the answer %d, want error %t", status, resp.StatusCode, isError)
			}
			continue
		}
		ue := refusal(t, err)
		if !isError || ue.Status != status || ue.Op != "POST /v2/app/blobs/uploads/" || ue.Caller != hub.As(anna).Caller() {
			t.Errorf("%d is the error %+v, want error %t", status, ue, isError)
		}
		withoutSecrets(t, err)
		var challenge []string
		if status == 401 {
			challenge = []string{`Basic realm="` + here.Host + `"`}
		}
		if !slices.Equal(ue.Challenge, challenge) {
			t.Errorf("%d has the challenge %q, want %q", status, ue.Challenge, challenge)
		}
	}
	here, _ := receiving(t, 401, http.Header{"Www-Authenticate": {`Bearer realm="https://evil.example/token"`}})
	if _, err := open(upstream.Options{}, here).As(anna).Push(t.Context(), &upstream.Pushed{Method: "POST", Path: "/v2/app/blobs/uploads/"}); !refusal(t, err).Nonsense || refusal(t, err).Challenge != nil {
		t.Errorf("error = %+v, want a foreign realm to be nonsense", refusal(t, err))
	}
	if _, err := open(upstream.Options{Offline: true}, here).As(anna).Push(t.Context(), &upstream.Pushed{Method: "POST", Path: "/v2/app/blobs/uploads/"}); !errors.Is(err, upstream.ErrOffline) {
		t.Errorf("error = %v, want that nobody is asked offline", err)
	}
}

// A client that cannot send what it announced, or leaves, fails its own push and
// says nothing about upstream.
func TestPushThatTheClientBreaksOffIsItsOwnTrouble(t *testing.T) {
	reg := newRegistry(t)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	hub := open(upstream.Options{}, reg.URL())
	for range 5 {
		body := io.MultiReader(strings.NewReader("half"), failing{})
		if _, err := hub.As(anna).Push(t.Context(), &upstream.Pushed{Method: "PATCH", Path: "/v2/app/blobs/uploads/1", Body: body, Length: 1000}); err == nil {
			t.Fatal("half a layer was sent")
		}
		ctx, leave := context.WithCancel(t.Context())
		pr, pw := io.Pipe()
		go func() {
			_, _ = pw.Write([]byte("half"))
			leave() // and the server has no more of the body
			pw.CloseWithError(context.Canceled)
		}()
		if _, err := hub.As(anna).Push(ctx, &upstream.Pushed{Method: "PATCH", Path: "/v2/app/blobs/uploads/1", Body: pr, Length: -1}); err == nil {
			t.Fatal("half a layer was sent")
		}
	}
	if h := hub.Health(); !h.Healthy {
		t.Errorf("health = %+v, want good", h)
	}
	for _, u := range []*upstream.Upstream{hub, hub.As(ben)} {
		if err := head(t, u, "app"); err != nil {
			t.Error(err)
		}
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("the client hung up") }

// One client's rate limit for pushes is not another's, and does not keep anybody
// from pulling.
func TestRateLimitOfAPushIsItsOwn(t *testing.T) {
	reg := newRegistry(t)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Status, Method: "POST", At: 429, Header: http.Header{"Retry-After": {"3600"}}})
	hub := open(upstream.Options{}, reg.URL())
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			_, err := hub.As(fmt.Sprint("Bearer ", i)).Push(t.Context(), &upstream.Pushed{Method: "POST", Path: "/v2/app/blobs/uploads/"})
			if ue := new(upstream.Error); !errors.As(err, &ue) || ue.Status != 429 || ue.RetryAfter != time.Hour {
				t.Errorf("error = %v, want upstream's 429", err)
			}
		})
	}
	wg.Wait()
	if got := reg.Count("POST", ""); got != 4 {
		t.Errorf("upstream was asked %d times, want once for each client", got)
	}
	for _, u := range []*upstream.Upstream{hub, hub.As("Bearer 0")} {
		if err := head(t, u, "app"); err != nil {
			t.Error(err)
		}
	}
}

// After a push upstream is asked again for what of the repository it had not, by
// whoever it was told, and for nothing else.
func TestForgetMissingIsOfOneRepository(t *testing.T) {
	reg := newRegistry(t)
	hub := open(upstream.Options{}, reg.URL())
	repositories := []string{"app", "app2", "library/app", "app/more"}
	askers := []*upstream.Upstream{hub, hub.As(""), hub.As(anna)}
	ask := func() (asked []string) {
		t.Helper()
		for _, repo := range repositories {
			reg.Reset()
			for _, u := range askers {
				if err := head(t, u, repo); !errors.Is(err, fs.ErrNotExist) {
					t.Fatalf("error = %v, want a 404", err)
				}
				if _, err := u.HeadBlob(t.Context(), repo, digest.FromString("x")); !errors.Is(err, fs.ErrNotExist) {
					t.Fatalf("error = %v, want a 404", err)
				}
			}
			if n := len(reg.Requests()); n != 0 {
				asked = append(asked, fmt.Sprint(repo, " ", n))
			}
		}
		return asked
	}
	if got, want := ask(), []string{"app 6", "app2 6", "library/app 6", "app/more 6"}; !slices.Equal(got, want) {
		t.Fatalf("at first upstream is asked %q, want %q", got, want)
	}
	hub.As(ben).ForgetMissing("app")
	if got, want := ask(), []string{"app 6"}; !slices.Equal(got, want) {
		t.Errorf("then it is asked %q, want %q", got, want)
	}
}

// An upstream that begins to answer a push and then falls silent is given up on, as
// with every other body that stops arriving.
func TestPushAnswerThatStallsIsGivenUpOn(t *testing.T) {
	for _, status := range []int{http.StatusCreated, http.StatusInternalServerError} {
		release := make(chan struct{})
		here := newServer(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, "half")
			_ = http.NewResponseController(w).Flush()
			select {
			case <-release:
			case <-time.After(3 * time.Second):
			}
		})
		began := time.Now()
		resp, err := open(upstream.Options{IdleTimeout: 100 * time.Millisecond}, here).As(anna).Push(t.Context(), &upstream.Pushed{Method: "PUT", Path: "/v2/app/manifests/1", Body: strings.NewReader("{}"), Length: 2})
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		if took := time.Since(began); err == nil || took > 2*time.Second {
			t.Errorf("the answer %d that stalls ends after %v with %v, want an error after 100ms", status, took.Round(time.Millisecond), err)
		}
		close(release)
	}
}
