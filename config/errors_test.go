package config_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"tidemark/config"
)

// Everything that is wrong is told at once, in the order of the file, each with
// its line and its key. What a wrong value would have led to is not told.
func TestAllErrorsAreToldAtOnce(t *testing.T) {
	errs := refused(t, `data: [a, b]
regsitry: {}
registry:
  tls: none
  listen: {port: 5050}
upstreams:
  docker.io:
    endpoint: https://registry-1.docker.io
    hosts: hub.example
    insecure: yes
    username: ${TM_NOT_SET}
  quay.io: true
tags:
  ttl: 60
cache:
  max_bytes: 120%
  min_free: 1 apple
  prefetch: "true"
audit: x
`)
	want := []string{
		`1: data: want a single value`, `2: regsitry: unknown key`,
		`4: registry.tls: want keys and values`, `5: registry.listen: want a single value`,
		`8: upstreams[docker.io].endpoint: unknown key`, `9: upstreams[docker.io].hosts: want a list`,
		`10: upstreams[docker.io].insecure: want true or false`, `11: upstreams[docker.io].username: ${TM_NOT_SET} is not set`,
		`12: upstreams[quay.io]: want keys and values`, `14: tags.ttl: "60" is not a duration`,
		`16: cache.max_bytes: "120%" is not a size`, `17: cache.min_free: "1 apple" is not a size`,
		`18: cache.prefetch: want true or false`, `19: audit: want keys and values`,
	}
	for _, w := range want {
		if !slices.ContainsFunc(errs, func(e *config.Error) bool {
			return strings.HasPrefix(fmt.Sprintf("%d: %s: %s", e.Line, e.Path, e.Message), w)
		}) {
			t.Errorf("not told: %s", w)
		}
	}
	if len(errs) != len(want) {
		t.Errorf("%d errors are told, want %d:\n%v", len(errs), len(want), errs)
	}
	if !slices.IsSortedFunc(errs, func(a, b *config.Error) int { return a.Line - b.Line }) {
		t.Errorf("not in the order of the file:\n%v", errs)
	}
	for _, e := range errs {
		if !strings.Contains(errs.Error(), fmt.Sprintf("line %d: %s: %s", e.Line, e.Path, e.Message)) {
			t.Errorf("the whole does not tell line %d, %s:\n%v", e.Line, e.Path, errs)
		}
	}
}

// Who mistypes a key is told which keys there are.
func TestUnknownKeyTellsTheKnownOnes(t *testing.T) {
	for _, known := range []string{"listen", "token_file"} {
		if err := refused(t, "admin: {token: x}\n"); !strings.Contains(err.Error(), known) {
			t.Errorf("%v; want it to mention %s", err, known)
		}
	}
}

// A value that makes no sense is refused with its key, and with its line when
// it stands in the file (0: it does not).
func TestValuesThatMakeNoSense(t *testing.T) {
	here := write(t, "not PEM")
	empty := write(t, "\n")
	for _, tt := range []struct {
		name, file string
		line       int
		path, says string
	}{
		{"no folder", "data: ''", 1, "data", "folder"},
		{"a list of nothing known", "- data: x", 1, "", "keys and values"},
		{"a text", "hello", 1, "", "keys and values"},
		{"two documents", "data: x\n---\ndata: y\n", 2, "", "one document"},
		{"a port alone", "registry: {listen: 5050}", 1, "registry.listen", "127.0.0.1:5050"},
		{"no port", "admin: {listen: localhost}", 1, "admin.listen", "127.0.0.1"},
		{"empty port", "admin: {listen: 'localhost:'}", 1, "admin.listen", "127.0.0.1"},
		{"unknown tls mode", "registry: {tls: {mode: acem}}", 1, "registry.tls.mode", "internal"},
		{"files without certificate", fmt.Sprintf("registry: {tls: {mode: files, key_file: %q}}", here), 1, "registry.tls.cert_file", "needs"},
		{"files without key", fmt.Sprintf("registry: {tls: {mode: files, cert_file: %q}}", here), 1, "registry.tls.key_file", "needs"},
		{"absent certificate", fmt.Sprintf("registry: {tls: {mode: files, cert_file: /absent, key_file: %q}}", here), 1, "registry.tls.cert_file", "no such file"},
		{"certificate for nothing", fmt.Sprintf("registry: {tls: {cert_file: %q}}", here), 1, "registry.tls.cert_file", "mode files"},
		{"hosts for nothing", "registry: {tls: {hosts: [a]}}", 1, "registry.tls.hosts", "mode internal"},
		{"internal without hosts", "registry: {listen: ':5050', tls: {mode: internal}}", 1, "registry.tls.hosts", "names or addresses"},
		{"absent token", "admin: {token_file: /absent}", 1, "admin.token_file", "no such file"},
		{"empty token", fmt.Sprintf("admin: {token_file: %q}", empty), 1, "admin.token_file", "empty"},
		{"default upstream misspelt", "default_upstream: docker.oi", 1, "default_upstream", "docker.io"},
		{"default upstream left out", "upstreams:\n  quay.io:\n", 0, "default_upstream", "quay.io"},
		{"no upstreams", "upstreams: {}", 0, "default_upstream", "docker.io"},
		{"upper-case name", "upstreams: {docker.io: {}, GHCR.io: {}}", 1, "upstreams[GHCR.io]", "lower case"},
		{"a name with a path", "upstreams: {docker.io: {}, ghcr.io/acme: {}}", 1, "upstreams[ghcr.io/acme]", "host"},
		{"other scheme", "upstreams: {docker.io: {endpoints: ['https://a', 'ftp://b']}}", 1, "upstreams[docker.io].endpoints[1]", `"ftp"`},
		{"no scheme", "upstreams: {docker.io: {endpoints: [registry.example]}}", 1, "upstreams[docker.io].endpoints[0]", "https://"},
		{"a query", "upstreams: {docker.io: {endpoints: ['https://a?b=c']}}", 1, "upstreams[docker.io].endpoints[0]", "query"},
		{"credentials in an address", "upstreams:\n  docker.io:\n    endpoints: ['https://a:b@c']", 3, "upstreams[docker.io].endpoints[0]", "password_file"},
		{"a host that is none", "upstreams: {docker.io: {hosts: ['https://a']}}", 1, "upstreams[docker.io].hosts[0]", "host"},
		{"a host of two upstreams", "upstreams:\n  docker.io: {hosts: [Hub.example]}\n  quay.io: {hosts: [a.example, hub.example]}\n", 3, "upstreams[quay.io].hosts[1]", "docker.io"},
		{"a host that is another upstream", "upstreams:\n  docker.io: {hosts: [quay.io]}\n  quay.io:\n", 2, "upstreams[docker.io].hosts[0]", "quay.io"},
		{"username alone", "upstreams: {docker.io: {username: a}}", 1, "upstreams[docker.io].username", "together"},
		{"password alone", fmt.Sprintf("upstreams: {docker.io: {password_file: %q}}", here), 1, "upstreams[docker.io].username", "together"},
		{"two passwords", fmt.Sprintf("upstreams: {docker.io: {username: a, password: '${HOME}', password_file: %q}}", here), 1, "upstreams[docker.io].password_file", "password"},
		{"absent password", "upstreams: {docker.io: {username: a, password_file: /absent}}", 1, "upstreams[docker.io].password_file", "no such file"},
		{"absent authority", "upstreams: {docker.io: {ca_file: /absent}}", 1, "upstreams[docker.io].ca_file", "no such file"},
		{"an authority that is none", fmt.Sprintf("upstreams: {docker.io: {ca_file: %q}}", here), 1, "upstreams[docker.io].ca_file", "PEM"},
		{"negative duration", "tags: {ttl: -1s}", 1, "tags.ttl", "90s"},
		{"unknown refresh", "tags: {refresh: sometimes}", 1, "tags.refresh", "background"},
		{"a cache of nothing", "cache: {max_bytes: 0}", 1, "cache.max_bytes", "nothing"},
		{"everything free", "cache: {min_free: 100%}", 1, "cache.min_free", "nothing"},
		{"origin with a space", "audit: {origin: my log}", 1, "audit.origin", "no spaces"},
		{"origin with a plus", "audit: {origin: log+1}", 1, "audit.origin", "no +"},
		{"origin of two lines", `audit: {origin: "a\nb"}`, 1, "audit.origin", "name"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			errs := refused(t, tt.file)
			i := slices.IndexFunc(errs, func(e *config.Error) bool { return e.Path == tt.path })
			if i < 0 {
				t.Fatalf("told is\n%v\nwant an error at %q", errs, tt.path)
			}
			if e := errs[i]; e.Line != tt.line || !strings.Contains(e.Message, tt.says) {
				t.Errorf("line %d: %s: %s; want line %d and a word about %s", e.Line, e.Path, e.Message, tt.line, tt.says)
			}
		})
	}
}

// A file that is not YAML, or says something twice, is refused with the place.
func TestFilesThatCannotBeRead(t *testing.T) {
	for _, tt := range []struct{ file, says string }{
		{"data: x\nadmin: {listen: a\n", "2"},
		{"data: x\nadmin: 'a\n", "2"},
		{"data: x\nadmin: a: b\n", "2"},
		{"  data: x\n admin: {}\n", "2"},
		{"data: x\ntags: {}\ndata: y\n", `data`},
		{"upstreams:\n  docker.io:\n  quay.io:\n  docker.io:\n", `docker.io`},
		{"tags: {ttl: 1s, ttl: 2s}\n", `ttl`},
	} {
		if err := refused(t, tt.file); !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%q: %v; want it to name %s", tt.file, err, tt.says)
		}
	}
}

// A variable that is empty is a value; one that is not set is an error, which
// names it, wherever it stands.
func TestVariableThatIsNotSet(t *testing.T) {
	t.Setenv("TM_EMPTY", "")
	mustParse(t, "admin: {token_file: '${TM_EMPTY}'}\n")
	for _, tt := range []struct{ file, path string }{
		{"data: a/${TM_NOT_SET}/b", "data"},
		{"tags: {ttl: '${TM_NOT_SET}'}", "tags.ttl"},
		{"upstreams: {docker.io: {hosts: ['${TM_NOT_SET}']}}", "upstreams[docker.io].hosts[0]"},
		{"upstreams: {docker.io: {username: a, password: '${TM_NOT_SET}'}}", "upstreams[docker.io].password"},
	} {
		errs := refused(t, tt.file)
		if len(errs) != 1 || errs[0].Path != tt.path || !strings.Contains(errs[0].Message, "${TM_NOT_SET}") {
			t.Errorf("%s: told is\n%v\nwant one error at %s that names ${TM_NOT_SET}", tt.file, errs, tt.path)
		}
	}
}

// A configuration that would let strangers have what is not theirs is refused
// by the key that would make it right.
func TestConfigurationThatWouldLeakIsRefused(t *testing.T) {
	t.Setenv("TM_PW", "s3cret")
	token := write(t, "token")
	cert := write(t, "")
	creds := "\nupstreams: {docker.io: {username: a, password: '${TM_PW}'%s}}"
	for _, tt := range []struct {
		name, file string
		path       string // of the error, "" if it loads
	}{
		{"plain http on loopback", "registry: {listen: 'localhost:1'}", ""},
		{"plain http on another loopback", "registry: {listen: '127.8.0.1:1'}", ""},
		{"plain http on loopback, v6", "registry: {listen: '[::1]:1'}", ""},
		{"plain http everywhere", "registry: {listen: ':1'}", "registry.tls.mode"},
		{"plain http everywhere, v4", "registry: {listen: '0.0.0.0:1'}", "registry.tls.mode"},
		{"plain http everywhere, v6", "registry: {listen: '[::]:1'}", "registry.tls.mode"},
		{"plain http on an address", "registry: {listen: '10.0.0.1:1'}", "registry.tls.mode"},
		{"plain http on a name", "registry: {listen: 'localhost.example:1'}", "registry.tls.mode"},
		{"plain http, meant", "registry: {listen: ':1', tls: {insecure: true}}", ""},
		{"tls of our own", "registry: {listen: ':1', tls: {mode: internal, hosts: [a]}}", ""},
		{"tls of files", fmt.Sprintf("registry: {listen: ':1', tls: {mode: files, cert_file: %q, key_file: %q}}", cert, cert), ""},

		{"admin everywhere", "admin: {listen: ':1'}", "admin.token_file"},
		{"admin on an address", "admin: {listen: '192.168.0.1:1'}", "admin.token_file"},
		{"admin everywhere with a token", fmt.Sprintf("admin: {listen: ':1', token_file: %q}", token), ""},

		{"credentials on loopback", fmt.Sprintf(creds, ""), ""},
		{"credentials off loopback", "registry: {listen: ':1', tls: {insecure: true}}" + fmt.Sprintf(creds, ""), "upstreams[docker.io]"},
		{"credentials behind tls", "registry: {listen: ':1', tls: {mode: internal, hosts: [a]}}" + fmt.Sprintf(creds, ""), "upstreams[docker.io]"},
		{"credentials, shared", "registry: {listen: ':1', tls: {insecure: true}}" + fmt.Sprintf(creds, ", shared: true"), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.path == "" {
				mustParse(t, tt.file)
				return
			}
			if errs := refused(t, tt.file); len(errs) != 1 || errs[0].Path != tt.path {
				t.Errorf("told is\n%v\nwant one error at %s", errs, tt.path)
			}
		})
	}
}

// Whatever else is wrong with a file, the error does not show its secrets, nor
// those of the environment and of files.
func TestErrorsHideSecrets(t *testing.T) {
	t.Setenv("TM_PW", "hunter2")
	file := write(t, "hunter2")
	hub := "upstreams:\n  docker.io:\n    username: a\n    "
	for name, text := range map[string]string{
		"literal":                         hub + "password: hunter2\n",
		"literal below another error":     hub + "foo: 1\n    password: hunter2\n",
		"literal above another error":     hub + "password: hunter2\n    foo: 1\n",
		"quoted":                          hub + "password: \"hunter2\"\n    foo: 1\n",
		"with spaces":                     hub + "password: a hunter2\n    foo: 1\n",
		"flow":                            "upstreams: {docker.io: {username: a, password: hunter2, foo: 1}}\n",
		"json":                            `{"upstreams": {"docker.io": {"password": "hunter2", "foo": 1}}}`,
		"a list":                          hub + "password: [hunter2]\n",
		"partly from the environment":     hub + "password: ${TM_PW}hunter2\n    foo: 1\n",
		"the environment's":               hub + "password: ${TM_PW}\n    foo: 1\n    ca_file: /absent\n",
		"twice":                           hub + "password: hunter2\n    password: hunter2\n",
		"file that is not YAML":           hub + "password: hunter2\n    endpoints: [a\n",
		"password that is not YAML":       hub + "password: hunter2: x\n",
		"quote that does not end":         hub + "password: 'hunter2\n    foo: 1\n",
		"token where the file belongs":    "admin:\n  token: hunter2\n",
		"of an address":                   hub + "endpoints: ['https://a:hunter2@b']\n",
		"of an address, not decoded":      hub + "endpoints: ['https://a:hunter2@b']\n    foo: 1\n",
		"of an address of another scheme": hub + "endpoints: ['ftp://a:hunter2@b']\n",
		"of a file, beside an error":      hub + "password_file: " + file + "\n    ca_file: /absent\n",
		"of a token file":                 "admin: {token_file: " + file + "}\ndefault_upstream: x\n",
	} {
		t.Run(name, func(t *testing.T) {
			errs := refused(t, text)
			shown := fmt.Sprintf("%v\n%+v", errs, errs)
			for _, e := range errs {
				shown += fmt.Sprintf("\n%+v", *e)
			}
			if strings.Contains(shown, "hunter2") {
				t.Errorf("the secret is shown:\n%s", shown)
			}
		})
	}
}
