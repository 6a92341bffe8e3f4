package config_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tidemark/config"
)

func mustParse(t *testing.T, file string) *config.Config {
	t.Helper()
	c, err := config.Parse([]byte(file), nil, nil)
	if err != nil {
		t.Fatalf("refused:\n%v\nthe file is\n%s", err, file)
	}
	return c
}

// refused returns what is wrong with a file that must not load.
func refused(t *testing.T, file string) config.Errors {
	t.Helper()
	c, err := config.Parse([]byte(file), nil, nil)
	if err == nil {
		t.Fatalf("accepted, and means\n%s\nthe file is\n%s", c, file)
	}
	var errs config.Errors
	if !errors.As(err, &errs) || len(errs) == 0 {
		t.Fatalf("the error is %T %v, want config.Errors with what is wrong", err, err)
	}
	return errs
}

func write(t *testing.T, content string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// plain is all that a configuration holds, secrets too, for comparison.
func plain(c *config.Config) string {
	top := *c
	top.Upstreams = nil
	s := fmt.Sprintf("%+v token=%q", top, string(c.Admin.Token))
	for _, name := range slices.Sorted(maps.Keys(c.Upstreams)) {
		u := c.Upstreams[name]
		s += fmt.Sprintf("\n%s: %+v password=%q", name, *u, string(u.Password))
	}
	return s
}

// A file that says nothing, in whatever way, is the default: the well-known
// registries, reachable from this machine only.
func TestAFileThatSaysNothingIsTheDefault(t *testing.T) {
	want := plain(mustParse(t, ""))
	for _, file := range []string{"\n\n", "# data: elsewhere\n", "---\n", "upstreams:\n", "registry:\ncache:\n", "tags: {}\n", "data:\r\n"} {
		if got := plain(mustParse(t, file)); got != want {
			t.Errorf("%q means\n%s\nwant\n%s", file, got, want)
		}
	}
	c, err := config.Load("", nil, nil)
	if err != nil || plain(c) != want {
		t.Errorf("no file at all: %v, means\n%s\nwant\n%s", err, c, want)
	}
	hub := c.Upstreams["docker.io"]
	if hub == nil || !slices.Equal(hub.Endpoints, []string{"https://registry-1.docker.io"}) || !slices.Equal(hub.TokenRealms, []string{"auth.docker.io"}) {
		t.Errorf("docker.io is %+v, want the Hub", hub)
	}
	if len(c.Upstreams) < 5 {
		t.Errorf("upstreams are %v, want the well-known ones", slices.Sorted(maps.Keys(c.Upstreams)))
	}
}

// The key upstreams replaces the well-known ones, and a name with nothing
// below it is a registry at its own address.
func TestUpstreamsAreThoseThatAreNamed(t *testing.T) {
	for _, file := range []string{
		"default_upstream: quay.io\nupstreams:\n  quay.io:\n",
		"default_upstream: quay.io\nupstreams: {quay.io: {}}\n",
		"default_upstream: quay.io\nupstreams: {quay.io: {endpoints: []}}\n",
	} {
		c := mustParse(t, file)
		if got := slices.Collect(maps.Keys(c.Upstreams)); !slices.Equal(got, []string{"quay.io"}) {
			t.Errorf("upstreams are %v, want quay.io alone", got)
		}
		if got := c.Upstreams["quay.io"].Endpoints; !slices.Equal(got, []string{"https://quay.io"}) {
			t.Errorf("quay.io is at %v, want https://quay.io", got)
		}
	}
}

// Flags speak before what was said is judged, and are judged with it.
func TestOverrideIsValidated(t *testing.T) {
	path := write(t, "data: ./from-file\n")
	c, err := config.Load(path, func(c *config.Config) { c.Data = "./from-flag" }, nil)
	if err != nil || c.Data != "./from-flag" {
		t.Errorf("data = %v, %v; want the flag's", c, err)
	}
	if _, err := config.Load(path, func(c *config.Config) { c.Registry.Listen = "0.0.0.0:5050" }, nil); err == nil {
		t.Error("a flag may open the registry to the world without TLS")
	}
	if _, err := config.Load(path+".absent", nil, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent file: %v, want os.ErrNotExist", err)
	}
}

// ${NAME} is the environment's, wherever a value can stand, and stays one
// value whatever it holds.
func TestEnvironmentIsPutIn(t *testing.T) {
	t.Setenv("TM_PORT", "6000")
	t.Setenv("TM_DIR", "a: b # c")
	t.Setenv("TM_EMPTY", "")
	t.Setenv("TM_TTL", "5m")
	c := mustParse(t, `
data: ${TM_DIR}/$HOME/${1}${TM_EMPTY}
registry: {listen: "127.0.0.1:${TM_PORT}"}
tags: {ttl: "${TM_TTL}"}
upstreams:
  docker.io: {hosts: ["hub.${TM_PORT}.example"]}
`)
	for _, v := range []struct{ key, got, want string }{
		{"data", c.Data, "a: b # c/$HOME/${1}"},
		{"registry.listen", c.Registry.Listen, "127.0.0.1:6000"},
		{"tags.ttl", c.Tags.TTL.String(), "5m"},
		{"hosts", c.Upstreams["docker.io"].Hosts[0], "hub.6000.example"},
	} {
		if v.got != v.want {
			t.Errorf("%s = %q, want %q", v.key, v.got, v.want)
		}
	}
}

// A secret comes from its file without the line's end, or from the environment.
func TestSecretsAreRead(t *testing.T) {
	t.Setenv("TM_PW", "from env")
	c := mustParse(t, fmt.Sprintf(`
admin: {token_file: %q}
upstreams:
  docker.io: {username: a, password_file: %q}
  ghcr.io: {username: b, password: "${TM_PW}"}
`, write(t, "tok en\n"), write(t, " pass\r\n\n")))
	for _, v := range []struct{ whose, got, want string }{
		{"admin", string(c.Admin.Token), "tok en"},
		{"docker.io", string(c.Upstreams["docker.io"].Password), " pass"},
		{"ghcr.io", string(c.Upstreams["ghcr.io"].Password), "from env"},
	} {
		if v.got != v.want {
			t.Errorf("secret of %s = %q, want %q", v.whose, v.got, v.want)
		}
	}
}

// A configuration that was loaded can be shown, and no way of showing it shows
// a secret.
func TestShownConfigurationHidesSecrets(t *testing.T) {
	t.Setenv("TM_PW", "hunter2")
	c := mustParse(t, fmt.Sprintf(`
admin: {token_file: %q}
upstreams:
  docker.io: {username: a, password_file: %q}
  ghcr.io: {username: b, password: "${TM_PW}"}
`, write(t, "hunter2"), write(t, "hunter2")))
	asJSON, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	shown := []string{c.String(), fmt.Sprint(c), fmt.Sprintf("%+v", *c), fmt.Sprintf("%#v", *c), string(asJSON)}
	for _, u := range c.Upstreams {
		shown = append(shown, fmt.Sprintf("%v %+v %#v %q", *u, *u, *u, u.Password))
	}
	for _, s := range shown {
		if strings.Contains(s, "hunter2") {
			t.Errorf("a secret is shown:\n%s", s)
		}
	}
	if n := strings.Count(c.String(), "redacted"); n != 2 {
		t.Errorf("%d secrets are marked as redacted, want 2:\n%s", n, c)
	}
}

// What is shown can be loaded again, but for its secrets, and means the same.
func TestShownConfigurationLoads(t *testing.T) {
	t.Setenv("TM_ODD", `a: "b" # c\d`)
	cert := write(t, "not looked at before it is used")
	for name, file := range map[string]string{
		"default": "",
		"odd text": `
data: ${TM_ODD}
audit: {origin: tidemark.example/prod}
`,
		"tls of files": fmt.Sprintf(`
registry: {listen: ":5050", tls: {mode: files, cert_file: %q, key_file: %q}}
admin: {listen: "[::1]:80", token_file: %q}
`, cert, cert, write(t, "token")),
		"tls of our own": `
registry: {listen: "[::1]:5050", tls: {mode: internal}}
`,
		"values": `
data: "true"
tags: {ttl: 36h, refresh: background}
cache: {max_bytes: 12.5%, min_free: 1500MB, prefetch: false}
default_upstream: localhost:5000
upstreams:
  localhost:5000:
    endpoints: [http://localhost:5000, "https://[::1]:5000/base"]
    hosts: [Mirror.Example, "mirror.example:80"]
    insecure: true
  10.0.0.1: {shared: true, token_realms: [auth.example]}
`,
		"credentials": fmt.Sprintf(`
upstreams:
  docker.io: {username: "0123", password_file: %q}
`, write(t, "secret")),
	} {
		t.Run(name, func(t *testing.T) {
			c := mustParse(t, file)
			shown := strings.ReplaceAll(c.String(), "password: redacted", `password: ""`)
			if got, want := plain(mustParse(t, shown)), plain(c); got != want {
				t.Errorf("shown and loaded again it means\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// Whatever a file holds, it is refused or becomes a valid configuration.
func FuzzParse(f *testing.F) {
	f.Setenv("TM_PW", "s3cret")
	for _, seed := range []string{
		"", "data: x\n", "- a\n", "data: [a\n", "? [a]\n: b\n", "<<: {data: x}\n", "data: &a x\naudit: *a\n", "a: b: c\n",
		"---\ndata: x\n---\n", "\ufeffdata: x\r\n", "data: |\n  x\n", "? a\n: b\n", "data: !!binary x\n", "data: \"\\x\"\n",
		"tags: {ttl: 1d, refresh: background}\ncache: {max_bytes: 1e3KiB, min_free: 0, prefetch: false}\n",
		"registry: {listen: ':1', tls: {mode: internal, hosts: [a, 10.0.0.1], insecure: true}}\n",
		"default_upstream: a\nupstreams:\n  a:\n    endpoints: ['https://b', http://c:1/d]\n    hosts: [E, 'f:1']\n  g:\n",
		"upstreams:\n  docker.io: {username: u, password: \"${TM_PW}\", token_realms: [], insecure: true, shared: true}\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := config.Parse(data, nil, nil)
		if err != nil {
			var errs config.Errors
			if c != nil || !errors.As(err, &errs) || err.Error() == "" {
				t.Fatalf("%v, %T %v; want no configuration and what is wrong", c, err, err)
			}
			return
		}
		if c.Data == "" || c.Registry.Listen == "" || c.Admin.Listen == "" || c.Upstreams[c.DefaultUpstream] == nil || c.Cache.MaxBytes.Of(1<<50) < 0 || c.Tags.TTL < 0 {
			t.Fatalf("accepted, and means\n%s", c)
		}
		for name, u := range c.Upstreams {
			if name == "" || len(u.Endpoints) == 0 || (u.Username == "") != (u.Password == "") {
				t.Fatalf("accepted, and upstream %q is %+v", name, u)
			}
		}
	})
}

// What stands behind the host of an address that is posted to is not shown; nor is the
// host of services that have a secret there.
func TestAddressesAreShownWithoutSecrets(t *testing.T) {
	for address, want := range map[string]string{
		"https://hooks.example/services/a-secret?b=a-secret":       "https://hooks.example/redacted",
		"tls://siem.example:6514":                                  "tls://siem.example:6514/redacted",
		"pushover://shoutrrr:a-secret@a-secret":                    "pushover://redacted",
		"telegram://1:a-secret@telegram?chats=@a-secret":           "telegram://redacted",
		"shoutrrr://gotify://host.example/a-secret?disabletls=yes": "shoutrrr://redacted",
		"://a-secret":  "redacted",
		"a-secret%zz:": "redacted",
		"":             `""`,
	} {
		if got := config.Webhook(address).String(); got != want {
			t.Errorf("%s is shown as %s, want %s", address, got, want)
		}
		if got := fmt.Sprintf("%#v", config.Webhook(address)); strings.Contains(got, "a-secret") {
			t.Errorf("%s", got)
		}
	}
}
