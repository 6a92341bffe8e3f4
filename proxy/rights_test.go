package proxy_test

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/proxy/oci"
	"tidemark/proxy/upstream"
	"tidemark/proxy/upstream/upstreamtest"
)

// The clients of these stories, by the Authorization that they send.
const (
	alice    = "Bearer alice-may-read-acme"
	mallory  = "Bearer mallory-may-read-evil"
	nobody   = ""
	secret   = "SECRET CONTENT OF A PRIVATE LAYER "
	acme     = "acme/private"
	evil     = "evil/own"
	realmAsk = `scope="repository:acme/private:pull"`
)

// A vault is a mirror in front of a ghcr.io with the private repository of Alice
// and the private one of Mallory.
type vault struct {
	*mirror
	img  upstreamtest.Image // of Alice
	sbom upstreamtest.Content
}

func newVault(t *testing.T, s settings) *vault {
	t.Helper()
	return newVaultOf(t, s, false, false)
}

func newVaultOf(t *testing.T, s settings, hides, bare bool) *vault {
	t.Helper()
	s.passthrough = true
	v := &vault{newMirror(t, s), upstreamtest.NewImage(strings.Repeat(secret, 3000), secret+"2"), upstreamtest.Content{}}
	v.sbom = upstreamtest.NewImage(secret + "sbom").Manifest
	v.ghcr.PushPrivate(acme, "1", v.img, alice)
	v.ghcr.PushPrivate(evil, "1", upstreamtest.NewImage("of mallory"), mallory)
	if bare {
		v.ghcr.PushManifest(acme, v.sbom.Digest.String(), v.sbom)
		v.ghcr.PushManifest(acme, oci.ReferrersTag(v.img.Manifest.Digest), upstreamtest.NewReferrerIndex("application/spdx+json", v.sbom))
	} else {
		v.ghcr.Refer(acme, v.img.Manifest.Digest, "application/spdx+json", v.sbom)
	}
	if hides {
		v.ghcr.Hide()
	}
	return v
}

// as sends a request with an Authorization.
func (v *vault) as(who, method, path string, headers ...string) answer {
	v.t.Helper()
	if who != nobody {
		headers = append(headers, "Authorization: "+who)
	}
	return v.do(method, path, headers...)
}

// pullAs pulls Alice's image whole.
func (v *vault) pullAs(who string) {
	v.t.Helper()
	for _, path := range []string{
		"manifests/1", "manifests/" + v.img.Manifest.Digest.String(), "referrers/" + v.img.Manifest.Digest.String(), "manifests/" + v.sbom.Digest.String(),
		"blobs/" + v.img.Config.Digest.String(), "blobs/" + v.img.Layers[0].Digest.String(), "blobs/" + v.img.Layers[1].Digest.String(), "tags/list",
	} {
		if a := v.as(who, "GET", "/v2/ghcr.io/"+acme+"/"+path); a.status != 200 || a.err != nil {
			v.t.Fatalf("GET %s as %q = %d %s, %v; want it", path, who, a.status, a.body, a.err)
		}
	}
}

// routes are all ways to content of Alice's.
func (v *vault) routes() (paths []string) {
	layer, man := v.img.Layers[0].Digest.String(), v.img.Manifest.Digest.String()
	for _, p := range []string{
		"manifests/1", "manifests/" + man, "manifests/" + v.sbom.Digest.String(), "blobs/" + layer, "blobs/" + v.img.Config.Digest.String(),
		"referrers/" + man, "tags/list", "_tidemark/tag-history/1", "manifests/" + oci.ReferrersTag(v.img.Manifest.Digest),
	} {
		paths = append(paths, "/v2/ghcr.io/"+acme+"/"+p)
		// And of the past.
		paths = append(paths, "/v2/at/0/ghcr.io/"+acme+"/"+p, "/at/0/v2/ghcr.io/"+acme+"/"+p, "/v2/asof/2026-01-01/ghcr.io/"+acme+"/"+p)
	}
	// The same content by the names of other repositories, and of another registry.
	for _, repo := range []string{"ghcr.io/" + evil, "ghcr.io/acme/public", "library/app"} {
		paths = append(paths, "/v2/"+repo+"/manifests/"+man, "/v2/"+repo+"/blobs/"+layer, "/v2/at/0/"+repo+"/manifests/"+man, "/at/0/v2/"+repo+"/blobs/"+layer)
	}
	return paths
}

// looks are the ways to look at a route.
var looks = []struct {
	method  string
	headers []string
}{
	{"GET", nil}, {"HEAD", nil}, {"GET", []string{"Range: bytes=0-99"}}, {"GET", []string{"Range: bytes=-1"}}, {"GET", []string{`If-None-Match: "x"`}},
}

// What upstream does not let a client have, it does not get from us: not by tag,
// digest, range, referrers, history, nor by the name of another repository; cold,
// cached, or arriving for somebody else. It is told what upstream tells it, after
// the same question to upstream whether or not it is here, and not a byte of the
// content.
func TestWhoHasNoRightsGetsNothing(t *testing.T) {
	for _, kind := range []struct {
		name        string
		hides, bare bool // strangers are told 404; there are no lists of referrers
	}{{"", false, false}, {"without lists of referrers", false, true}, {"that hides", true, false}, {"that hides, without lists", true, true}} {
		t.Run("upstream "+kind.name, func(t *testing.T) { whoHasNoRights(t, kind.hides, kind.bare) })
	}
}

func whoHasNoRights(t *testing.T, hides, bare bool) {
	type told struct {
		status int
		header string
		body   string
		asked  []string
	}
	states := map[string]func(*vault){
		"cold":   func(*vault) {},
		"cached": func(v *vault) { v.pullAs(alice); v.settled() },
		"arriving": func(v *vault) {
			v.as(alice, "GET", "/v2/ghcr.io/"+acme+"/manifests/1")
			v.ghcr.Break(upstreamtest.Fault{Name: upstreamtest.Stall, Method: "GET", Path: v.img.Layers[0].Digest.String(), At: 50_000})
			go v.as(alice, "GET", "/v2/ghcr.io/"+acme+"/blobs/"+v.img.Layers[0].Digest.String())
			for len(v.cache.Stats().Fills) == 0 || v.cache.Stats().Fills[0].Have == 0 {
				time.Sleep(time.Millisecond)
			}
		},
	}
	got := make(map[string]told)
	for _, state := range []string{"cold", "cached", "arriving"} {
		for _, who := range []string{nobody, mallory} {
			v := newVaultOf(t, settings{silence: 5 * time.Second, ttl: time.Hour}, hides, bare)
			v.ghcr.PushManifest("acme/public", "1", upstreamtest.NewImage("public").Manifest)
			v.hub.PushManifest("library/app", "1", upstreamtest.NewImage("public").Manifest)
			states[state](v)
			// Whoever may read a repository of her own is no stranger there.
			if a := v.as(mallory, "GET", "/v2/ghcr.io/"+evil+"/manifests/1"); a.status != 200 {
				t.Fatalf("mallory does not get her own: %d %s", a.status, a.body)
			}
			for _, path := range v.routes() {
				for _, look := range looks {
					name := fmt.Sprintf("%s %s %v as %q", look.method, path, look.headers, who)
					before := append(v.ghcr.Requests(), v.hub.Requests()...)
					a := v.as(who, look.method, path, look.headers...)
					var asked []string
					for _, r := range append(v.ghcr.Requests(), v.hub.Requests()...)[len(before):] {
						asked = append(asked, r.Method+" "+r.Path+" "+r.Authorization)
					}
					if a.status < 401 || a.status > 404 {
						t.Errorf("%s, %s: status %d, want a refusal", state, name, a.status)
					}
					if bytes.Contains(a.body, []byte(secret[:10])) || a.header.Get("Docker-Content-Digest") != "" || a.header.Get("Etag") != "" || a.header.Get("Content-Range") != "" {
						t.Errorf("%s, %s: tells %s %s", state, name, a.header, a.body)
					}
					header := a.header.Get("Www-Authenticate") + a.header.Get("Cache-Status")
					is := told{a.status, strings.ReplaceAll(header, v.ghcr.URL().Host, "ghcr.test"), string(a.body), asked}
					if state == "cold" {
						got[name] = is
						continue
					}
					if cold := got[name]; cold.status != is.status || cold.header != is.header || len(cold.asked) != len(is.asked) {
						t.Errorf("%s: %s it tells %+v, cold %+v", name, state, is, cold)
					}
				}
			}
			if t.Failed() {
				return
			}
		}
	}
	if hides {
		return
	}
	private := got[fmt.Sprintf("GET /v2/ghcr.io/%s/manifests/1 [] as %q", acme, nobody)]
	if private.status != 401 || !strings.Contains(private.header, realmAsk) {
		t.Errorf("without an Authorization it is %+v, want upstream's challenge", private)
	}
	if d := got[fmt.Sprintf("GET /v2/ghcr.io/%s/manifests/1 [] as %q", acme, mallory)]; d.status != 403 || !strings.Contains(d.body, "DENIED") {
		t.Errorf("as another user it is %+v, want upstream's 403", d)
	}
}

// Who may read a repository has it from the cache, after one question to upstream
// for the repository and each piece of content that nobody has had from there yet;
// for five minutes no more are asked.
func TestRightsAreAskedForOnceAndKeptForMinutes(t *testing.T) {
	v := newVault(t, settings{ttl: time.Hour})
	v.pullAs(alice)
	v.settled()
	v.ghcr.Reset()
	v.pullAs(alice)
	for _, r := range v.ghcr.Requests() {
		if !strings.HasSuffix(r.Path, "/tags/list") {
			t.Errorf("the second pull asked upstream for %s %s, want nothing", r.Method, r.Path)
		}
	}
	bob := "Bearer bob-may-too"
	v.ghcr.PushPrivate(acme, "1", v.img, alice, bob)
	v.ghcr.Reset()
	v.pullAs(bob)
	var asked []string
	for _, r := range v.ghcr.Requests() {
		if !strings.HasSuffix(r.Path, "/tags/list") {
			asked = append(asked, r.Method+" "+r.Path+" "+r.Authorization)
		}
	}
	if want := []string{"HEAD /v2/" + acme + "/manifests/1 " + bob}; !slices.Equal(asked, want) {
		t.Errorf("another reader's pull asked upstream %q, want %q", asked, want)
	}
}

// A client's credentials are sent to the upstream that it talks to, and to no
// other, nor where that one redirects; those of the configuration are not used for
// it.
func TestCredentialsOfClientsGoToTheirUpstreamOnly(t *testing.T) {
	v := newVault(t, settings{login: upstream.Static("robot", "s3cret")})
	layer := v.img.Layers[0].Digest.String()
	v.ghcr.Break(upstreamtest.Fault{Name: upstreamtest.Redirect, Path: layer})
	v.pullAs(alice)
	v.as(alice, "GET", "/v2/library/app/manifests/1")
	for _, r := range v.ghcr.Requests() {
		switch redirected := r.Host != v.ghcr.URL().Host; {
		case redirected && r.Authorization != "":
			t.Errorf("where upstream redirected to got the Authorization %q", r.Authorization)
		case !redirected && r.Authorization != alice:
			t.Errorf("%s %s was asked with %q, want the client's own", r.Method, r.Path, r.Authorization)
		}
	}
}

// An upstream that is shared is asked with the configured credentials for
// everybody; what is private to a client of another upstream is not to be had
// through it.
func TestSharedUpstreamIsForEverybody(t *testing.T) {
	v := newVault(t, settings{shared: true, login: upstream.Static("robot", "s3cret")})
	v.ghcr.RequireBasic("robot", "s3cret")
	img := upstreamtest.NewImage("shared")
	v.ghcr.Push("team/app", "1", img)
	v.pull("ghcr.io/team/app", "1", img)

	private := upstreamtest.NewImage(secret + "of the hub")
	v.hub.PushPrivate("alice/app", "1", private, alice)
	if a := v.as(alice, "GET", "/v2/alice/app/blobs/"+private.Layers[0].Digest.String()); a.status != 200 {
		t.Fatalf("alice gets %d %s", a.status, a.body)
	}
	v.settled()
	if a := v.get("/v2/ghcr.io/team/app/blobs/" + private.Layers[0].Digest.String()); a.status != 404 || bytes.Contains(a.body, []byte(secret)) {
		t.Errorf("through a shared upstream it is %d %s, want 404", a.status, a.body)
	}
	if a := v.get("/v2/_catalog"); !strings.Contains(string(a.body), "ghcr.io/team/app") || strings.Contains(string(a.body), "alice") {
		t.Errorf("the catalog is %s, want what is shared", a.body)
	}
}

// The first thing that a client asks is answered with upstream's own challenge,
// which is asked for once in a while and not for each client.
func TestPingRelaysTheChallenge(t *testing.T) {
	v := newVault(t, settings{})
	v.ghcr.RequireToken("", "", time.Minute)
	for range 5 {
		a := v.get("/v2/?ns=ghcr.io")
		if a.status != 401 || !strings.HasPrefix(a.header.Get("Www-Authenticate"), `Bearer realm="`+v.ghcr.URL().String()+`/token",service="upstreamtest"`) {
			t.Fatalf("ping = %d %v, want upstream's challenge", a.status, a.header)
		}
	}
	if n := v.ghcr.Count("GET", "/v2/"); n != 1 {
		t.Errorf("upstream was asked %d times, want once", n)
	}
	if a := v.get("/v2/"); a.status != 200 {
		t.Errorf("of an upstream that asks for nothing it is %d, want 200", a.status)
	}
}

// A challenge that would send a client's password elsewhere is not told to it.
func TestForeignRealmIsNotRelayed(t *testing.T) {
	v := newVault(t, settings{})
	v.ghcr.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 401, Header: http.Header{"Www-Authenticate": {`Bearer realm="https://evil.example/token",service="x"`}}})
	for _, path := range []string{"/v2/?ns=ghcr.io", "/v2/ghcr.io/" + acme + "/manifests/1", "/v2/ghcr.io/" + acme + "/tags/list"} {
		a := v.get(path)
		if a.status != 502 || a.header.Get("Www-Authenticate") != "" || !strings.Contains(string(a.body), "token_realms") {
			t.Errorf("GET %s = %d %v %s, want 502 that says what to configure", path, a.status, a.header, a.body)
		}
	}
}

// One client's refusal is not another's: neither the answer of a question that
// both wait for, nor what upstream was said to have lately not.
func TestRefusalOfOneIsNotOfAnother(t *testing.T) {
	v := newVault(t, settings{})
	for _, path := range []string{"manifests/1", "blobs/" + v.img.Layers[0].Digest.String()} {
		if a := v.as(nobody, "GET", "/v2/ghcr.io/"+acme+"/"+path); a.status != 401 {
			t.Fatalf("nobody gets %d for %s", a.status, path)
		}
	}
	v.ghcr.Break(upstreamtest.Fault{Name: upstreamtest.Status, Path: "/manifests/1", At: 404, Times: 1})
	if a := v.as(mallory, "GET", "/v2/ghcr.io/"+acme+"/manifests/1"); a.status != 404 {
		t.Fatalf("mallory gets %d", a.status)
	}
	v.pullAs(alice)

	v.ghcr.Break(upstreamtest.Fault{Name: upstreamtest.Status, Path: acme + "/manifests/2", At: 429, Times: 1, Header: http.Header{"Retry-After": {"60"}}})
	if a := v.as(mallory, "GET", "/v2/ghcr.io/"+acme+"/manifests/2"); a.status != 429 || a.header.Get("Retry-After") != "60" {
		t.Fatalf("mallory gets %d %v, want her limit", a.status, a.header)
	}
	v.ghcr.PushPrivate(acme, "3", v.img, alice)
	if a := v.as(alice, "GET", "/v2/ghcr.io/"+acme+"/manifests/3"); a.status != 200 {
		t.Errorf("after the limit of another, alice gets %d %s", a.status, a.body)
	}
}

// Rights count for as long as they are kept while upstream is silent; then nobody
// can say who may have it, and upstream's silence is what is told.
func TestRightsWhileUpstreamIsSilent(t *testing.T) {
	v := newVault(t, settings{silence: 200 * time.Millisecond})
	v.pullAs(alice)
	v.settled()
	v.ghcr.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 503})
	v.pullAs(alice)
	never := "blobs/" + digest.FromString("never seen").String()
	all := []string{"manifests/1", "blobs/" + v.img.Layers[0].Digest.String(), "tags/list", "referrers/" + v.img.Manifest.Digest.String(), never}
	for who, paths := range map[string][]string{nobody: all, mallory: all, alice: {never}} {
		for _, path := range paths {
			if a := v.as(who, "GET", "/v2/ghcr.io/"+acme+"/"+path); a.status != 502 || bytes.Contains(a.body, []byte(secret)) {
				t.Errorf("%s as %q = %d %s, want upstream's trouble", path, who, a.status, a.body)
			}
		}
	}
}

// A move of a private tag is explained from what the client that saw it may read.
func TestMoveOfAPrivateTagIsExplained(t *testing.T) {
	v := newVault(t, settings{})
	v.pullAs(alice)
	v.settled()
	next := upstreamtest.NewImage(strings.Repeat(secret, 3000), secret+"3")
	v.ghcr.PushPrivate(acme, "1", next, alice)
	v.as(alice, "GET", "/v2/ghcr.io/"+acme+"/manifests/1")
	entries, err := v.store.Events(t.Context(), audit.EventQuery{Type: audit.Moved})
	if err != nil || len(entries) != 1 || !bytes.Contains(entries[0].Leaf, []byte(`"diff":{`)) || !bytes.Contains(entries[0].Leaf, []byte(`"identity":"client"`)) {
		t.Fatalf("the ledger has %d moves, %v: %s; want one with its diff, seen by a client", len(entries), err, fmt.Sprint(entries))
	}
}

// An upstream behind a page where people log in answers everything with 200. That is
// no right to anything.
func TestPageForPeopleIsNoRight(t *testing.T) {
	for _, fault := range []string{upstreamtest.Login, upstreamtest.Garbage} {
		v := newVault(t, settings{})
		v.pullAs(alice)
		v.settled()
		v.ghcr.Break(upstreamtest.Fault{Name: fault})
		for _, path := range append(v.routes(), "/v2/ghcr.io/no/such/manifests/1", "/v2/ghcr.io/no/such/blobs/"+v.img.Layers[0].Digest.String()) {
			for _, who := range []string{nobody, mallory} {
				for range 2 {
					if a := v.as(who, "GET", path); a.status < 400 || bytes.Contains(a.body, []byte(secret[:10])) {
						t.Errorf("behind %s: GET %s as %q = %d %.100s, want a refusal", fault, path, who, a.status, a.body)
					}
				}
			}
		}
	}
}

// A blob behind a redirect, where nothing names its digest, is proven by its size.
func TestBlobBehindARedirectIsProvenByItsSize(t *testing.T) {
	v := newVault(t, settings{})
	v.pullAs(alice)
	v.settled()
	bob := "Bearer bob-may-too"
	v.ghcr.PushPrivate(acme, "1", v.img, alice, bob)
	layer := v.img.Layers[0].Digest.String()
	v.ghcr.Break(upstreamtest.Fault{Name: upstreamtest.NoDigest, Path: layer})
	if a := v.as(bob, "GET", "/v2/ghcr.io/"+acme+"/blobs/"+layer); a.status != 200 || len(a.body) != len(v.img.Layers[0].Body) {
		t.Errorf("bob gets %d with %d bytes", a.status, len(a.body))
	}
}

// A list of referrers that a stranger was shown is not the one that a reader gets.
func TestListOfAStrangerIsNotKept(t *testing.T) {
	for _, bare := range []bool{false, true} {
		v := newVaultOf(t, settings{ttl: time.Hour}, true, bare)
		path := "/v2/ghcr.io/" + acme + "/referrers/" + v.img.Manifest.Digest.String()
		v.as(nobody, "GET", path)
		v.as(mallory, "GET", path)
		if a := v.as(alice, "GET", path); a.status != 200 || !bytes.Contains(a.body, []byte(v.sbom.Digest)) {
			t.Errorf("without lists %t: alice gets %d %s, want what refers to her image", bare, a.status, a.body)
		}
		if a := v.as(nobody, "GET", path); a.status == 200 {
			t.Errorf("without lists %t: then nobody gets %s", bare, a.body)
		}
	}
}

// A client that upstream refuses now is refused, however lately it was let in, and
// nobody else is told so; what it is told to be absent is not taken for deleted.
func TestRefusalEndsARight(t *testing.T) {
	for _, hides := range []bool{false, true} {
		v := newVaultOf(t, settings{}, hides, false)
		bob := "Bearer bob-may-too"
		v.ghcr.PushPrivate(acme, "1", v.img, alice, bob)
		v.pullAs(alice)
		v.pullAs(bob)
		v.ghcr.PushPrivate(acme, "1", v.img, bob) // not alice any more
		for range 4 {
			if a := v.as(alice, "GET", "/v2/ghcr.io/"+acme+"/manifests/1"); a.status != 403 && a.status != 404 || bytes.Contains(a.body, v.img.Manifest.Body) {
				t.Errorf("hidden %t: alice gets %d, want upstream's refusal", hides, a.status)
			}
			if a := v.as(bob, "GET", "/v2/ghcr.io/"+acme+"/manifests/1"); a.status != 200 || strings.Contains(a.header.Get("Cache-Status"), "403") || strings.Contains(a.header.Get("Cache-Status"), "404") {
				t.Errorf("hidden %t: bob gets %d %v, want it confirmed", hides, a.status, a.header)
			}
		}
		if entries, err := v.store.Events(t.Context(), audit.EventQuery{Type: audit.Deleted}); err != nil || len(entries) != 0 {
			t.Errorf("hidden %t: the tag is taken for deleted", hides)
		}
	}
}

// A tag that upstream has deleted is served to who may still have its digest.
func TestDeletedTagIsServedToWhoMayHaveItsDigest(t *testing.T) {
	v := newVault(t, settings{})
	v.pullAs(alice)
	v.ghcr.Delete(acme, "1")
	if a := v.as(alice, "GET", "/v2/ghcr.io/"+acme+"/manifests/1"); a.status != 200 {
		t.Errorf("alice gets %d %s, want what the tag meant last", a.status, a.body)
	}
	if a := v.as(mallory, "GET", "/v2/ghcr.io/"+acme+"/manifests/1"); a.status != 403 {
		t.Errorf("mallory gets %d", a.status)
	}
}

// An Authorization that no registry would take is refused before it is sent.
func TestLargeAuthorizationIsRefused(t *testing.T) {
	v := newVault(t, settings{})
	if a := v.as("Bearer "+strings.Repeat("x", 40_000), "GET", "/v2/ghcr.io/"+acme+"/manifests/1"); a.status != 431 {
		t.Errorf("it is %d, want 431", a.status)
	}
	if n := len(v.ghcr.Requests()); n != 0 {
		t.Errorf("upstream was asked %d times", n)
	}
}

// A gateway that answers everybody with something, which names nothing, proves
// nothing: not for who joins a blob of unknown size that arrives for somebody else,
// and not for who only asks how large it is.
func TestAnswerOfAGatewayIsNoProof(t *testing.T) {
	body := strings.Repeat(secret, 5000)
	dgst, half, rest := digest.FromString(body), make(chan struct{}), make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != alice || r.Method != http.MethodGet {
			w.Header().Set("Content-Type", "text/plain")
			return // 200, whatever it is
		}
		_, _ = w.Write([]byte(body[:len(body)/2])) // without a length
		_ = http.NewResponseController(w).Flush()
		close(half)
		<-rest
		_, _ = w.Write([]byte(body[len(body)/2:]))
	}))
	t.Cleanup(srv.Close)
	m := newMirror(t, settings{passthrough: true, hubAt: srv.URL, silence: 10 * time.Second})
	path := "/v2/acme/private/blobs/" + dgst.String()
	done := make(chan answer)
	go func() { done <- m.get(path, "Authorization: "+alice) }()
	<-half
	refused := func(state string) {
		t.Helper()
		for _, method := range []string{"GET", "HEAD"} {
			a := m.do(method, path, "Authorization: "+mallory)
			if strings.Contains(string(a.body), secret) || a.header.Get("Content-Length") == strconv.Itoa(len(body)) {
				t.Errorf("%s: %s as mallory = %d with %d bytes and %v, want nothing of it", state, method, a.status, len(a.body), a.header)
			}
		}
	}
	refused("arriving")
	close(rest)
	if a := <-done; string(a.body) != body {
		t.Errorf("alice gets %d with %d bytes, want hers", a.status, len(a.body))
	}
	m.settled()
	refused("stored")
}

// Who may read a repository may read its past, while upstream says that they may.
func TestThePastIsForWhoMayReadIt(t *testing.T) {
	v := newVault(t, settings{})
	v.pullAs(alice)
	v.ghcr.PushPrivate(acme, "1", upstreamtest.NewImage("moved"), alice)
	v.as(alice, "GET", "/v2/ghcr.io/"+acme+"/manifests/1")
	for _, path := range []string{"/v2/at/0/ghcr.io/" + acme + "/manifests/1", "/at/0/v2/ghcr.io/" + acme + "/manifests/1"} {
		if a := v.as(alice, "GET", path); a.status != 200 || a.header.Get("Docker-Content-Digest") != v.img.Manifest.Digest.String() {
			t.Errorf("%s as alice: %d %v %s", path, a.status, a.header, a.body)
		}
	}
	if a := v.as(alice, "GET", "/v2/at/0/ghcr.io/"+acme+"/blobs/"+v.img.Layers[1].Digest.String()); a.status != 200 {
		t.Errorf("a layer as alice: %d %s", a.status, a.body)
	}
	for _, who := range []string{mallory, nobody} {
		if a := v.as(who, "GET", "/v2/at/0/ghcr.io/"+acme+"/manifests/1"); a.status == 200 || bytes.Contains(a.body, []byte(v.img.Layers[0].Digest)) {
			t.Errorf("as %q: %d %s", who, a.status, a.body)
		}
	}
}
