package upstream_test

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tidemark/proxy/upstream"
	"tidemark/proxy/upstream/upstreamtest"
)

// A helper is a program docker-credential-NAME of Docker's protocol, on PATH, and
// what it was called with.
type helper struct{ dir, name string }

// newHelper puts a shell script on PATH, which finds the server that it is asked
// about in $server.
func newHelper(t *testing.T, name, script string) *helper {
	t.Helper()
	h := &helper{t.TempDir(), name}
	text := fmt.Sprintf("#!/bin/sh\nserver=$(cat)\necho \"$1 $server\" >>%s/calls\n%s\n", h.dir, script)
	if err := os.WriteFile(filepath.Join(h.dir, "docker-credential-"+name), []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", h.dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	return h
}

// calls are what the helper was asked, in order.
func (h *helper) calls(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(h.dir, "calls"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if len(text) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

// dockerConfig writes a config.json.
func dockerConfig(t *testing.T, text string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func b64(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

// knows answers for one server and says of others what helpers say that do not
// know them.
const knows = `case "$server" in
"https://index.docker.io/v1/") echo '{"ServerURL":"https://index.docker.io/v1/","Username":"huber","Secret":"of the hub"}' ;;
reg.example:5000) echo '{"Username":"meier","Secret":"of reg"}' ;;
acr.example) echo '{"Username":"<token>","Secret":"identity of acr"}' ;;
*) echo "credentials not found in native keychain"; exit 1 ;;
esac`

// What a config.json of Docker says about a host is what Docker would use: what is
// written in it, or what the helper says that it names.
func TestDockerConfigIsReadAsDockerDoes(t *testing.T) {
	newHelper(t, "test", knows)
	newHelper(t, "other", `echo '{"Username":"other","Secret":"of another helper"}'`)
	hub := []string{"docker.io", "index.docker.io", "registry-1.docker.io"}
	for _, c := range []struct {
		name, config string
		hosts        []string
		want         upstream.Credential
	}{
		{"auth", `{"auths":{"ghcr.io":{"auth":"` + b64("anna:p:w") + `"}}}`, []string{"ghcr.io"}, upstream.Credential{Username: "anna", Password: "p:w"}},
		{"auth that ends in zeros", `{"auths":{"ghcr.io":{"auth":"` + b64("anna:pw\x00\x00") + `"}}}`, []string{"ghcr.io"}, upstream.Credential{Username: "anna", Password: "pw"}},
		{"auth without a password", `{"auths":{"ghcr.io":{"auth":"` + b64("anna:") + `"}}}`, []string{"ghcr.io"}, upstream.Credential{Username: "anna"}},
		{"user and password", `{"auths":{"ghcr.io":{"username":"anna","password":"pw"}}}`, []string{"ghcr.io"}, upstream.Credential{Username: "anna", Password: "pw"}},
		{"identity token", `{"auths":{"acr.example":{"identitytoken":"id"}}}`, []string{"acr.example"}, upstream.Credential{IdentityToken: "id"}},
		{"identity token of a user", `{"auths":{"acr.example":{"auth":"` + b64("0000:") + `","identitytoken":"id"}}}`, []string{"acr.example"}, upstream.Credential{Username: "0000", IdentityToken: "id"}},
		{"an address for a name", `{"auths":{"https://index.docker.io/v1/":{"auth":"` + b64("anna:pw") + `"}}}`, hub, upstream.Credential{Username: "anna", Password: "pw"}},
		{"an address with a port", `{"auths":{"http://reg.example:5000/v2/":{"auth":"` + b64("anna:pw") + `"}}}`, []string{"reg.example:5000"}, upstream.Credential{Username: "anna", Password: "pw"}},
		{"another port", `{"auths":{"reg.example:5001":{"auth":"` + b64("anna:pw") + `"}}}`, []string{"reg.example:5000", "reg.example"}, upstream.Credential{}},
		{"the first host that has any", `{"auths":{"b":{"auth":"` + b64("b:b") + `"},"c":{"auth":"` + b64("c:c") + `"}}}`, []string{"a", "b", "c"}, upstream.Credential{Username: "b", Password: "b"}},
		{"another host", `{"auths":{"ghcr.io":{"auth":"` + b64("anna:pw") + `"},"xghcr.io":{"auth":"` + b64("x:x") + `"}}}`, []string{"quay.io", "x", "io"}, upstream.Credential{}},
		{"an entry of nothing", `{"auths":{"ghcr.io":{}}}`, []string{"ghcr.io"}, upstream.Credential{}},
		{"nothing", `{}`, []string{"ghcr.io"}, upstream.Credential{}},
		{"what is not about credentials", `{"HttpHeaders":{"X":"y"},"detachKeys":"ctrl-e","plugins":{"a":{"b":"c"}}}`, []string{"ghcr.io"}, upstream.Credential{}},

		{"the store, under the name of the login", `{"auths":{"https://index.docker.io/v1/":{}},"credsStore":"test"}`, hub, upstream.Credential{Username: "huber", Password: "of the hub"}},
		{"the store, which was not logged in to", `{"credsStore":"test"}`, []string{"reg.example:5000"}, upstream.Credential{Username: "meier", Password: "of reg"}},
		{"the store, which does not know it", `{"credsStore":"test"}`, []string{"ghcr.io", "reg.example:5000"}, upstream.Credential{Username: "meier", Password: "of reg"}},
		{"the store, which knows nobody", `{"credsStore":"test"}`, []string{"ghcr.io"}, upstream.Credential{}},
		{"an identity token of a helper", `{"credHelpers":{"acr.example":"test"}}`, []string{"acr.example"}, upstream.Credential{IdentityToken: "identity of acr"}},
		{"the host's helper before the store", `{"credsStore":"test","credHelpers":{"reg.example:5000":"other"}}`, []string{"reg.example:5000"}, upstream.Credential{Username: "other", Password: "of another helper"}},
		{"the host's helper before the file", `{"auths":{"ghcr.io":{"auth":"` + b64("anna:pw") + `"}},"credHelpers":{"ghcr.io":"other"}}`, []string{"ghcr.io"}, upstream.Credential{Username: "other", Password: "of another helper"}},
		{"another host's helper", `{"auths":{"ghcr.io":{"auth":"` + b64("anna:pw") + `"}},"credHelpers":{"quay.io":"other"}}`, []string{"ghcr.io"}, upstream.Credential{Username: "anna", Password: "pw"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := upstream.DockerConfig(dockerConfig(t, c.config), c.hosts...)(t.Context())
			if err != nil || got != c.want {
				t.Errorf("credentials = %+v, %v; want %+v", got, err, c.want)
			}
		})
	}
}

// A helper is asked by the words of Docker's protocol, under the name that the
// login had, and once for each host that may have one.
func TestHelperIsAskedAsDockerAsks(t *testing.T) {
	h := newHelper(t, "test", knows)
	path := dockerConfig(t, `{"auths":{"https://index.docker.io/v1/":{}},"credsStore":"test"}`)
	if _, err := upstream.DockerConfig(path, "docker.io", "index.docker.io", "registry-1.docker.io")(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, want := h.calls(t), []string{"get docker.io", "get https://index.docker.io/v1/"}; !slices.Equal(got, want) {
		t.Errorf("the helper was asked %q, want %q", got, want)
	}
}

// The file is read at each call: who logs in, or out, need not restart anything.
func TestDockerConfigIsFollowed(t *testing.T) {
	path := dockerConfig(t, `{}`)
	ask := upstream.DockerConfig(path, "ghcr.io")
	for _, c := range []struct {
		text, user string
	}{{`{"auths":{"ghcr.io":{"auth":"` + b64("anna:pw") + `"}}}`, "anna"}, {`{"auths":{"ghcr.io":{"auth":"` + b64("ben:pw") + `"}}}`, "ben"}, {`{}`, ""}} {
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := ask(t.Context()); err != nil || got.Username != c.user {
			t.Errorf("credentials = %+v, %v; want those of %q", got, err, c.user)
		}
	}
}

// What is written under the very name of a host counts before what is written
// under an address of it, and it is always the same that counts.
func TestCredentialsOfAHostAreAlwaysTheSame(t *testing.T) {
	newHelper(t, "a", `echo '{"Username":"a","Secret":"s"}'`)
	newHelper(t, "b", `echo '{"Username":"b","Secret":"s"}'`)
	for name, text := range map[string]string{
		"file":    `{"auths":{"https://ghcr.io/v2/":{"auth":"` + b64("b:s") + `"},"ghcr.io":{"auth":"` + b64("a:s") + `"},"https://ghcr.io":{"auth":"` + b64("c:s") + `"},"ghcr.io/team":{"auth":"` + b64("d:s") + `"}}}`,
		"helpers": `{"credHelpers":{"https://ghcr.io":"b","ghcr.io":"a"}}`,
	} {
		path := dockerConfig(t, text)
		seen := make(map[string]int)
		for range 20 {
			got, err := upstream.DockerConfig(path, "ghcr.io")(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			seen[got.Username]++
		}
		if seen["a"] != 20 {
			t.Errorf("%s: of 20 times these users were said: %v; want a, whose key is the host", name, seen)
		}
	}
}

// What goes wrong with credentials is told with the host and the file, or the
// helper, and never with anything that is secret.
func TestTroubleWithCredentialsIsToldWithoutThem(t *testing.T) {
	newHelper(t, "fails", `echo "the store is locked"; exit 1`)
	newHelper(t, "failsjson", `echo '{"ServerURL":"x","Username":"anna","Secret":"hunter2"}'; exit 1`)
	newHelper(t, "failslower", `echo '{"username":"anna","secret":"hunter2"}'; exit 3`)
	newHelper(t, "failsloudly", `echo "password hunter2" >&2; exit 1`)
	newHelper(t, "failslong", `i=0; while [ $i -lt 2000 ]; do echo "the store is locked, for the time number $i"; i=$((i+1)); done; exit 1`)
	newHelper(t, "garbage", `echo 'hunter2'`)
	newHelper(t, "garbagejson", `echo '{"Username":"anna","Secret":["hunter2"]}'`)
	newHelper(t, "cut", `printf '{"Username":"anna","Secret":"hunter2'`)
	newHelper(t, "silent", `exit 0`)
	for _, c := range []struct{ name, config, says string }{
		{"not JSON", `{"auths":{"ghcr.io":{"auth":"hunter2"}}`, "config.json of Docker"},
		{"a secret in the wrong place", `{"auths":{"ghcr.io":"hunter2"}}`, "config.json of Docker"},
		{"a number", `{"auths":{"ghcr.io":{"password":12345,"auth":"hunter2"}}}`, "config.json of Docker"},
		{"auth in the clear", `{"auths":{"ghcr.io":{"auth":"anna:hunter2"}}}`, "base64"},
		{"auth without a user", `{"auths":{"ghcr.io":{"auth":"` + b64("hunter2") + `"}}}`, "base64"},
		{"no such helper", `{"credHelpers":{"ghcr.io":"absent"}}`, "docker-credential-absent"},
		{"no such store", `{"credsStore":"absent"}`, "docker-credential-absent"},
		{"helper fails", `{"credHelpers":{"ghcr.io":"fails"}}`, "the store is locked"},
		{"helper fails with a secret", `{"credHelpers":{"ghcr.io":"failsjson"}}`, "docker-credential-failsjson"},
		{"helper fails with a secret, in lower case", `{"credHelpers":{"ghcr.io":"failslower"}}`, "docker-credential-failslower"},
		{"helper fails with a secret for people", `{"credHelpers":{"ghcr.io":"failsloudly"}}`, "docker-credential-failsloudly"},
		{"helper fails and fails", `{"credHelpers":{"ghcr.io":"failslong"}}`, "docker-credential-failslong"},
		{"helper says something else", `{"credHelpers":{"ghcr.io":"garbage"}}`, "docker-credential-garbage"},
		{"helper says something else, in JSON", `{"credHelpers":{"ghcr.io":"garbagejson"}}`, "docker-credential-garbagejson"},
		{"helper breaks off", `{"credHelpers":{"ghcr.io":"cut"}}`, "docker-credential-cut"},
		{"helper says nothing", `{"credHelpers":{"ghcr.io":"silent"}}`, "docker-credential-silent"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := dockerConfig(t, c.config)
			got, err := upstream.DockerConfig(path, "ghcr.io", "quay.io")(t.Context())
			if err == nil {
				t.Fatalf("credentials = %+v, want an error", got)
			}
			if got != (upstream.Credential{}) {
				t.Errorf("credentials = %+v beside an error", got)
			}
			for _, want := range []string{c.says, "ghcr.io", path} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error = %.300q, want a word about %s", err, want)
				}
			}
			if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), b64("hunter2")) {
				t.Errorf("error = %q shows the secret", err)
			}
			if len(err.Error()) > 2000 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
	absent := filepath.Join(t.TempDir(), "config.json")
	if _, err := upstream.DockerConfig(absent, "ghcr.io")(t.Context()); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), absent) {
		t.Errorf("error = %v, want the missing file", err)
	}
}

// The name of a helper becomes a command: one that could be another is refused,
// and nothing is run.
func TestHelperWithAnotherNameIsNotRun(t *testing.T) {
	h := newHelper(t, "test", `echo '{"Username":"a","Secret":"b"}'`)
	for _, name := range []string{
		"../" + filepath.Base(h.dir) + "/docker-credential-test", "./test", "/bin/sh", "a/b", `a\b`, "test x", "test;x", "$(test)", "test\n", "-test", ".", "..", "test\x00", " test", "тест", "*",
	} {
		quoted, err := json.Marshal(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{fmt.Sprintf(`{"credsStore":%s}`, quoted), fmt.Sprintf(`{"credHelpers":{"ghcr.io":%s}}`, quoted)} {
			got, err := upstream.DockerConfig(dockerConfig(t, text), "ghcr.io")(t.Context())
			if err == nil || !strings.Contains(err.Error(), "is not the name of a credential helper") {
				t.Errorf("helper %q = %+v, %v; want it refused for its name", name, got, err)
			}
		}
	}
	if got := h.calls(t); len(got) != 0 {
		t.Errorf("the helper was called %q", got)
	}
}

// A helper that hangs is given up on with the context, whether it waits itself or
// for a program that it has started.
func TestHelperThatHangsIsGivenUpOn(t *testing.T) {
	newHelper(t, "hangs", `exec sleep 5`)
	newHelper(t, "waits", `sleep 5`)
	for _, name := range []string{"hangs", "waits"} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		began := time.Now()
		_, err := upstream.DockerConfig(dockerConfig(t, `{"credsStore":"`+name+`"}`), "ghcr.io")(ctx)
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("a helper that %s is waited for for %v, want 300ms", name, took.Round(time.Millisecond))
		}
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "docker-credential-"+name) {
			t.Errorf("a helper that %s: %v, want the end of the context and its name", name, err)
		}
	}
}

// rotating is a helper whose password stands in a file, and takes a moment.
func rotating(t *testing.T) (h *helper, config string, rotate func(password string)) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "password")
	h = newHelper(t, "test", `sleep 0.1; echo "{\"Username\":\"`+user+`\",\"Secret\":\"$(cat `+file+`)\"}"`)
	rotate = func(password string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(password), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return h, dockerConfig(t, `{"credsStore":"test"}`), rotate
}

// all asks for a manifest many times at once.
func all(t *testing.T, hub *upstream.Upstream, repository string) {
	t.Helper()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := hub.HeadManifest(t.Context(), repository, "1"); err != nil {
				t.Error(err)
				withoutSecrets(t, err)
			}
		})
	}
	wg.Wait()
}

// A helper is called once for all who want to know, and what it said is kept. When
// its password is refused it is called again, once, and nobody notices.
func TestHelperIsCalledAgainWhenItsPasswordHasRunOut(t *testing.T) {
	h, config, rotate := rotating(t)
	reg := newRegistry(t)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	hub := open(upstream.Options{Credentials: upstream.DockerConfig(config, "ghcr.io")}, reg.URL())
	for i, pw := range []string{password, "second-" + password, "third-" + password} {
		rotate(pw)
		reg.RequireBasic(user, pw)
		all(t, hub, "app")
		all(t, hub, "app")
		if got := len(h.calls(t)); got != i+1 {
			t.Errorf("with %d passwords so far, the helper was called %d times, want %d", i+1, got, i+1)
		}
	}
}

// A password that a token realm refuses may have run out, too: the helper is
// called again, as it is for Basic.
func TestHelperIsCalledAgainWhenARealmRefusesItsPassword(t *testing.T) {
	h, config, rotate := rotating(t)
	reg := newRegistry(t)
	for _, repo := range []string{"a", "b"} {
		reg.Push(repo, "1", upstreamtest.NewImage("layer"))
	}
	hub := open(upstream.Options{Credentials: upstream.DockerConfig(config, "ghcr.io")}, reg.URL())
	rotate(password)
	reg.RequireToken(user, password, time.Minute)
	all(t, hub, "a")
	if got := len(h.calls(t)); got != 1 {
		t.Errorf("the helper was called %d times, want 1", got)
	}
	rotate("second-" + password)
	reg.RequireToken(user, "second-"+password, time.Minute)
	if err := head(t, hub, "b"); err != nil {
		t.Errorf("after the password was changed: %v", err)
	}
	if got := len(h.calls(t)); got != 2 {
		t.Errorf("after the password was changed the helper was called %d times in all, want 2", got)
	}
}

// A helper whose password stays wrong is not called for every pull, and upstream is
// not asked with it again and again.
func TestWrongPasswordOfAHelperIsNotTriedAgainAndAgain(t *testing.T) {
	h, config, rotate := rotating(t)
	rotate("wrong")
	reg := newRegistry(t)
	reg.RequireBasic(user, password)
	hub := open(upstream.Options{Credentials: upstream.DockerConfig(config, "ghcr.io")}, reg.URL())
	for range 5 {
		err := head(t, hub, "app")
		if ue := refusal(t, err); ue.Status != 401 {
			t.Errorf("error = %v, want 401", err)
		}
		if strings.Contains(err.Error(), "wrong") {
			t.Errorf("error = %v shows the password", err)
		}
	}
	if got := len(h.calls(t)); got > 2 {
		t.Errorf("the helper was called %d times, want 2 at most", got)
	}
	if got := len(reg.Requests()); got > 3 {
		t.Errorf("upstream was asked %d times, want 3 at most", got)
	}
}

// Credentials that nobody has are anonymity, which works where it may.
func TestHostWithoutCredentialsIsAskedAnonymously(t *testing.T) {
	newHelper(t, "test", knows)
	reg := newRegistry(t)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	for _, config := range []string{`{}`, `{"credsStore":"test"}`} {
		for _, require := range []func(){func() {}, func() { reg.RequireToken("", "", time.Minute) }} {
			require()
			hub := open(upstream.Options{Credentials: upstream.DockerConfig(dockerConfig(t, config), "ghcr.io")}, reg.URL())
			if err := head(t, hub, "app"); err != nil {
				t.Errorf("%s: %v", config, err)
			}
		}
	}
	reg.RequireBasic(user, password)
	hub := open(upstream.Options{Credentials: upstream.DockerConfig(dockerConfig(t, `{}`), "ghcr.io")}, reg.URL())
	if ue := refusal(t, head(t, hub, "app")); ue.Status != 401 {
		t.Errorf("error = %v, want 401", ue)
	}
	for _, q := range reg.Requests() {
		if strings.HasPrefix(q.Authorization, "Basic") {
			t.Errorf("upstream was sent %q, want nothing", q.Authorization)
		}
	}
}

// A helper that does not work is this machine's trouble and not upstream's: it is
// told, without secrets, and clients with rights of their own are not kept out.
func TestBrokenHelperDoesNotKeepClientsOut(t *testing.T) {
	reg := newRegistry(t)
	reg.RequireBasic(user, password)
	reg.Push("app", "1", upstreamtest.NewImage("layer"))
	hub := open(upstream.Options{Credentials: upstream.DockerConfig(dockerConfig(t, `{"credsStore":"absent"}`), "ghcr.io")}, reg.URL())
	for range 3 {
		err := head(t, hub, "app")
		if ue := refusal(t, err); !strings.Contains(ue.Error(), "docker-credential-absent") {
			t.Errorf("error = %v, want one that names the helper", err)
		}
		withoutSecrets(t, err)
	}
	if err := head(t, hub.As("Basic "+b64(user+":"+password)), "app"); err != nil {
		t.Errorf("a client with a password of its own: %v", err)
	}
}

// An identity token is exchanged at the realm, by POST and in the body, as OAuth 2
// has it; upstream itself sees the access token only.
func TestIdentityTokenIsExchangedAtTheRealm(t *testing.T) {
	type asked struct {
		method, contentType, authorization string
		query, form                        url.Values
	}
	got := make(chan asked, 10)
	realm, _ := newRealm(t, func(w http.ResponseWriter, r *http.Request) {
		query := r.URL.Query()
		if err := r.ParseForm(); err != nil {
			t.Error(err)
		}
		got <- asked{r.Method, r.Header.Get("Content-Type"), r.Header.Get("Authorization"), query, r.PostForm}
		fmt.Fprint(w, `{"access_token":"token-1","refresh_token":"another"}`)
	})
	sent := make(chan string, 10)
	challenge := challenging(realm.String() + "/token?kept=yes")
	here := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		sent <- r.Header.Get("Authorization")
		challenge(w, r)
	})
	hub := open(upstream.Options{Credentials: upstream.DockerConfig(dockerConfig(t, `{"auths":{"acr.example":{"auth":"`+b64("0000:")+`","identitytoken":"the-identity"}}}`), "acr.example")}, here)
	if err := head(t, hub, "library/app"); err != nil {
		t.Fatal(err)
	}
	a := <-got
	want := url.Values{"grant_type": {"refresh_token"}, "refresh_token": {"the-identity"}, "client_id": {"tidemark"}, "service": {"hub"}, "scope": {"repository:library/app:pull"}}
	if a.method != "POST" || a.contentType != "application/x-www-form-urlencoded" || a.form.Encode() != want.Encode() || a.authorization != "" {
		t.Errorf("the realm was asked %+v, want a form with %v", a, want)
	}
	if a.query.Encode() != "kept=yes" {
		t.Errorf("the realm was asked with the query %v, want its own alone", a.query)
	}
	if first, second := <-sent, <-sent; first != "" || second != "Bearer token-1" {
		t.Errorf("upstream was sent %q and %q, want nothing and the access token", first, second)
	}
}

// An identity token that is refused is told as the realm's refusal, and one is not
// a password: where Basic is asked for it is of no use and not sent.
func TestIdentityTokenStaysSecret(t *testing.T) {
	identity := func(context.Context) (upstream.Credential, error) {
		return upstream.Credential{IdentityToken: "the-identity"}, nil
	}
	realm, _ := newRealm(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprintf(w, `{"errors":[{"code":"UNAUTHORIZED","message":"%s is not known"}]}`, r.FormValue("refresh_token"))
	})
	reg := newRegistry(t)
	reg.RequireBasic(user, password)
	for _, endpoint := range []*url.URL{newServer(t, challenging(realm.String())), reg.URL()} {
		err := head(t, open(upstream.Options{Credentials: identity}, endpoint), "app")
		if ue := refusal(t, err); ue.Status != 401 || strings.Contains(ue.Error(), "the-identity") {
			t.Errorf("error = %v, want a 401 without the token", err)
		}
	}
	wantAsked(t, reg, "401")
}

// A late is a listener whose connections say nothing for a while.
type late struct{ net.Listener }

func (l late) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return &lateConn{Conn: c}, err
}

type lateConn struct {
	net.Conn
	begun sync.Once
}

func (c *lateConn) Read(p []byte) (int, error) {
	c.begun.Do(func() { time.Sleep(200 * time.Millisecond) })
	return c.Conn.Read(p)
}

// Who leaves while a token is fetched leaves it to those who come later, and has
// nothing to do with how that goes on.
func TestTokenIsFetchedForThoseWhoComeLater(t *testing.T) {
	asked := make(chan struct{}, 10)
	realm := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		giveToken(w, r)
		asked <- struct{}{}
	}))
	realm.Listener = late{realm.Listener}
	realm.StartTLS()
	t.Cleanup(realm.Close)
	roots := x509.NewCertPool()
	roots.AddCert(realm.Certificate())
	hub := open(upstream.Options{RootCAs: roots, Credentials: upstream.Static(user, password)}, newServer(t, challenging(realm.URL+"/token")))

	ctx, leave := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer leave()
	if _, err := hub.HeadManifest(ctx, "app", "1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("error = %v, want that of the one who left", err)
	}
	<-asked
	if err := head(t, hub, "app"); err != nil {
		t.Errorf("who comes later: %v", err)
	}
	if h := hub.Health(); !h.Healthy {
		t.Errorf("health = %+v, want good", h)
	}
	if got := len(asked); got != 0 {
		t.Errorf("the realm was asked %d times more, want once in all", got)
	}
}
