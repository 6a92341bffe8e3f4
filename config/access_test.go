package config_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/config"
)

// certificate is a file with one.
func certificate(t *testing.T) (path string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return write(t, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
}

// An accessCase is a configuration, and what is said of it.
type accessCase struct {
	name, file string
	path       string // of the one error, "" if it loads
	says       string
}

// judge loads each and compares what is said.
func judge(t *testing.T, cases []accessCase) {
	t.Helper()
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if c.path == "" {
				mustParse(t, c.file)
				return
			}
			errs := refused(t, c.file)
			if len(errs) != 1 || errs[0].Path != c.path || !strings.Contains(errs[0].Message, c.says) {
				t.Errorf("%s\nis told as\n%v\nwant one error at %s with a word about %s", c.file, errs, c.path, c.says)
			}
		})
	}
}

// Who may pull is one of three modes, each with what it needs and nothing that
// would be ignored.
func TestWhoMayPullIsSaidWhole(t *testing.T) {
	users := write(t, "anna:x") // what is in it, the one who opens it says
	judge(t, []accessCase{
		{"nobody is asked", "registry: {auth: {mode: none}}", "", ""},
		{"users", "registry: {auth: {mode: basic, htpasswd_file: " + users + "}}", "", ""},
		{"their own rights", "registry: {auth: {mode: passthrough}}", "", ""},
		{"nothing said", "registry: {auth: }", "", ""},
		{"no mode", "registry: {auth: {mode: ''}}", "registry.auth.mode", "passthrough"},
		{"another mode", "registry: {auth: {mode: Basic}}", "registry.auth.mode", "basic"},
		{"a mode of tls", "registry: {auth: {mode: files}}", "registry.auth.mode", "none"},
		{"users without a file", "registry: {auth: {mode: basic}}", "registry.auth.htpasswd_file", "htpasswd -B"},
		{"users in no file", "registry: {auth: {mode: basic, htpasswd_file: /absent}}", "registry.auth.htpasswd_file", "no such file"},
		{"a file for nobody", "registry: {auth: {htpasswd_file: " + users + "}}", "registry.auth.htpasswd_file", "mode basic"},
		{"a file beside their own rights", "registry: {auth: {mode: passthrough, htpasswd_file: " + users + "}}", "registry.auth.htpasswd_file", "mode basic"},
		{"their own rights, offline", "registry: {auth: {mode: passthrough}}\ntags: {offline: true}", "registry.auth.mode", "offline"},
		{"users, offline", "registry: {auth: {mode: basic, htpasswd_file: " + users + "}}\ntags: {offline: true}", "", ""},
		{"nobody, offline", "tags: {offline: true}", "", ""},
		{"a key that is not there", "registry: {auth: {mode: none, users: [anna]}}", "registry.auth.users", "unknown"},
	})
}

// Pushes are refused, or passed on with the client's credentials, which must not be
// those for this server.
func TestPushesNeedTheClientsOwnCredentials(t *testing.T) {
	users := write(t, "anna:x")
	judge(t, []accessCase{
		{"refused", "registry: {push: deny}", "", ""},
		{"passed on", "registry: {push: pass}", "", ""},
		{"passed on, their own rights", "registry: {push: pass, auth: {mode: passthrough}}", "", ""},
		{"passed on, users of this server", "registry: {push: pass, auth: {mode: basic, htpasswd_file: " + users + "}}", "registry.push", "passthrough"},
		{"refused, users of this server", "registry: {push: deny, auth: {mode: basic, htpasswd_file: " + users + "}}", "", ""},
		{"allowed", "registry: {push: allow}", "registry.push", "deny"},
		{"true", "registry: {push: true}", "registry.push", "pass"},
		{"nothing", "registry: {push: ''}", "registry.push", "deny"},
	})
	if got := mustParse(t, "").Registry.Push; got != config.PushDeny {
		t.Errorf("by default pushes are %q, want refused", got)
	}
}

// The intercepting proxy has an address, and tunnels to hosts only; what it would let
// around other rules is refused.
func TestInterceptingProxy(t *testing.T) {
	users, ca := write(t, "anna:x"), certificate(t)
	proxy := func(listen, more string) string {
		return "registry: {intercept: {listen: '" + listen + "'}" + more + "}"
	}
	cases := []accessCase{
		{"on loopback", proxy("127.0.0.1:5052", ""), "", ""},
		{"on loopback, v6", proxy("[::1]:5052", ""), "", ""},
		{"on loopback, by name", proxy("localhost:5052", ""), "", ""},
		{"everywhere", proxy(":5052", ""), "", ""}, // what it says is in TLS, and nothing of it is private
		{"everywhere, their own rights", proxy(":5052", ", auth: {mode: passthrough}"), "", ""},
		{"a port alone", proxy("5052", ""), "registry.intercept.listen", "127.0.0.1"},
		{"no port", proxy("127.0.0.1", ""), "registry.intercept.listen", "127.0.0.1"},
		{"no such port", proxy("127.0.0.1:65536", ""), "registry.intercept.listen", "127.0.0.1"},
		{"an address with a scheme", proxy("http://127.0.0.1:5052", ""), "registry.intercept.listen", "127.0.0.1"},

		{"users on loopback", proxy("127.0.0.1:5052", ", auth: {mode: basic, htpasswd_file: "+users+"}"), "", ""},
		{"users everywhere", proxy("0.0.0.0:5052", ", auth: {mode: basic, htpasswd_file: "+users+"}"), "registry.intercept.listen", "in the clear"},
		{"users everywhere, v6", proxy("[::]:5052", ", auth: {mode: basic, htpasswd_file: "+users+"}"), "registry.intercept.listen", "in the clear"},
		{"users everywhere, which is meant", proxy(":5052", ", tls: {insecure: true}, auth: {mode: basic, htpasswd_file: "+users+"}"), "", ""},

		{"certificates of clients, on loopback", proxy("127.0.0.1:5052", ", tls: {mode: internal, client_ca_file: "+ca+"}"), "", ""},
		{"certificates of clients, everywhere", proxy(":5052", ", tls: {mode: internal, client_ca_file: "+ca+"}"), "registry.intercept.listen", "client_ca_file"},
		{"certificates of clients and users, everywhere", proxy(":5052", ", tls: {mode: internal, insecure: true, client_ca_file: "+ca+"}, auth: {mode: basic, htpasswd_file: "+users+"}"), "registry.intercept.listen", "client_ca_file"},

		{"tunnels and no proxy", "registry: {intercept: {tunnel: [auth.docker.io]}}", "registry.intercept.tunnel", "registry.intercept.listen"},
		{"tunnels to none", "registry: {intercept: {tunnel: []}}", "", ""},
	}
	for _, host := range []string{"auth.docker.io", "AUTH.docker.io", "auth.docker.io:443", "a", "127.0.0.1", "127.0.0.1:8443", "10.0.0.1:22", "::1", "[::1]:443", "2001:db8::1", "localhost", "xn--bcher-kva.example"} {
		cases = append(cases, accessCase{"tunnel to " + host, "registry: {intercept: {listen: '127.0.0.1:5052', tunnel: ['" + host + "']}}", "", ""})
	}
	for _, host := range []string{
		"", "*", "*.docker.io", "https://auth.docker.io", "auth.docker.io/", "auth.docker.io:", "auth.docker.io:x", "auth.docker.io:65536", "auth.docker.io:443:443", "-a", "a.", ".a", "a b", "user@auth.docker.io",
		"[::1", "::1]:443", "10.0.0.0/8", ":443", "auth_docker.io", "bücher.example", "auth.docker.io,quay.io", "a:-1",
	} {
		cases = append(cases, accessCase{"tunnel to " + host, "registry: {intercept: {listen: '127.0.0.1:5052', tunnel: [auth.docker.io, '" + host + "']}}", "registry.intercept.tunnel[1]", "host"})
	}
	judge(t, cases)
}

// Content that was fetched with the configuration's credentials is not for everybody
// who can reach the registry, by either of its addresses: somebody must be asked who
// they are, or the upstream be said to be shared.
func TestCredentialsAreNotForEverybody(t *testing.T) {
	t.Setenv("TM_PW", "s3cret")
	users, ca, docker, pw := write(t, "anna:x"), certificate(t), write(t, `{"auths":{}}`), write(t, "s3cret")
	credentials := map[string]string{
		"environment":   "username: a, password: '${TM_PW}'",
		"file":          "username: a, password_file: " + pw,
		"docker_config": "docker_config: " + docker,
	}
	addresses := []struct {
		name, listen, intercept string
		open                    bool
	}{
		{"loopback", "127.0.0.1:1", "", false},
		{"loopback, both", "localhost:1", "'[::1]:2'", false},
		{"registry everywhere", "':1'", "", true},
		{"registry on an address", "10.0.0.1:1", "127.0.0.1:2", true},
		{"proxy everywhere", "127.0.0.1:1", "'[::]:2'", true},
		{"both everywhere", "0.0.0.0:1", "0.0.0.0:2", true},
	}
	modes := []struct {
		name, auth, tls string
		asks            bool // who clients are
	}{
		{"none", "mode: none", "mode: internal, hosts: [a]", false},
		{"none, insecure", "mode: none", "insecure: true", false},
		{"basic", "mode: basic, htpasswd_file: " + users, "mode: internal, hosts: [a], insecure: true", true},
		{"passthrough", "mode: passthrough", "mode: internal, hosts: [a]", true},
		{"certificates", "mode: none", "mode: internal, hosts: [a], client_ca_file: " + ca, true},
	}
	for kind, creds := range credentials {
		for _, a := range addresses {
			for _, m := range modes {
				for _, shared := range []bool{false, true} {
					if m.name == "certificates" && a.intercept != "" && strings.Contains(a.name, "everywhere") {
						continue // refused for another reason
					}
					intercept := ""
					if a.intercept != "" {
						intercept = ", intercept: {listen: " + a.intercept + "}"
					}
					file := fmt.Sprintf("registry: {listen: %s, tls: {%s}, auth: {%s}%s}\nupstreams:\n  docker.io:\n  ghcr.io: {%s, shared: %t}\n", a.listen, m.tls, m.auth, intercept, creds, shared)
					c := accessCase{fmt.Sprintf("%s, %s, %s, shared %t", kind, a.name, m.name, shared), file, "", ""}
					if a.open && !m.asks && !shared {
						c.path, c.says = "upstreams[ghcr.io]", "shared"
					}
					judge(t, []accessCase{c})
				}
			}
		}
	}
}

// The error says which address it is that is open.
func TestOpenAddressIsNamed(t *testing.T) {
	docker := write(t, `{}`)
	for file, addr := range map[string]string{
		"registry: {listen: '0.0.0.0:7', tls: {insecure: true}}":                                           "0.0.0.0:7",
		"registry: {intercept: {listen: '0.0.0.0:8'}}":                                                     "0.0.0.0:8",
		"registry: {listen: '127.0.0.1:7', tls: {mode: internal}, intercept: {listen: '192.168.1.1:8'}}":   "192.168.1.1:8",
		"registry: {listen: '[2001:db8::1]:7', tls: {mode: internal, hosts: [a]}, auth: {mode: none}}":     "[2001:db8::1]:7",
		"registry: {listen: 'mirror.example:7', tls: {mode: internal, hosts: [a]}, intercept: {listen: }}": "mirror.example:7",
	} {
		errs := refused(t, file+"\nupstreams: {docker.io: {docker_config: "+docker+"}}")
		if len(errs) != 1 || errs[0].Path != "upstreams[docker.io]" || !strings.Contains(errs[0].Message, addr) || !strings.Contains(errs[0].Message, "registry.auth.mode") {
			t.Errorf("%s\nis told as\n%v\nwant one error that names %s and registry.auth.mode", file, errs, addr)
		}
	}
}

// Docker's configuration is one way to log in and not a second one; it must be there,
// and be what it says it is.
func TestDockerConfigIsOneWayToLogIn(t *testing.T) {
	t.Setenv("TM_PW", "s3cret")
	docker := write(t, `{"auths":{"ghcr.io":{"auth":"YTpi"}},"credsStore":"x","HttpHeaders":{"a":"b"}}`)
	hub := func(keys string) string { return "upstreams: {docker.io: {" + keys + "}}" }
	judge(t, []accessCase{
		{"alone", hub("docker_config: " + docker), "", ""},
		{"of nothing", hub("docker_config: " + write(t, "{}")), "", ""},
		{"with a user", hub("docker_config: " + docker + ", username: a, password: '${TM_PW}'"), "upstreams[docker.io].docker_config", "username"},
		{"that is not there", hub("docker_config: /absent/config.json"), "upstreams[docker.io].docker_config", "no such file"},
		{"that is a folder", hub("docker_config: " + t.TempDir()), "upstreams[docker.io].docker_config", "directory"},
		{"that is empty", hub("docker_config: " + write(t, "")), "upstreams[docker.io].docker_config", "config.json"},
		{"that is a list", hub("docker_config: " + write(t, `["a"]`)), "upstreams[docker.io].docker_config", "config.json"},
		{"whose entries are none", hub("docker_config: " + write(t, `{"auths":{"ghcr.io":"YTpi"}}`)), "upstreams[docker.io].docker_config", "config.json"},
		{"whose store is none", hub("docker_config: " + write(t, `{"credsStore":["a"]}`)), "upstreams[docker.io].docker_config", "config.json"},
		{"a password alone", hub("password: '${TM_PW}'"), "upstreams[docker.io].username", "together"},
		{"beside a password", hub("docker_config: " + docker + ", password: '${TM_PW}'"), "upstreams[docker.io].username", "together"},
	})
	if u := mustParse(t, hub("docker_config: "+docker)).Upstreams["docker.io"]; !u.HasCredentials() {
		t.Error("an upstream with docker_config has no credentials, want some")
	}
	if u := mustParse(t, "").Upstreams["docker.io"]; u.HasCredentials() {
		t.Error("an upstream with nothing has credentials, want none")
	}
}

// Whatever is wrong with Docker's configuration, its content is not shown.
func TestDockerConfigIsNotShown(t *testing.T) {
	for _, text := range []string{
		`{"auths":{"ghcr.io":{"auth":"hunter2"}}`, `{"auths":{"ghcr.io":"hunter2"}}`, `hunter2`, `{"auths":{"ghcr.io":{"password":hunter2}}}`, `{"hunter2"}`, `["hunter2"]`, "\x00hunter2", `"hunter2"`,
	} {
		path := write(t, text)
		c, err := config.Parse([]byte("upstreams: {docker.io: {docker_config: "+path+"}}"), nil, nil)
		if err == nil {
			if strings.Contains(c.String(), "hunter2") {
				t.Errorf("%q is shown with the configuration", text)
			}
			continue // its trouble is another's to find
		}
		if strings.Contains(err.Error(), "hunter2") || !strings.Contains(err.Error(), path) {
			t.Errorf("%q is told as\n%v\nwant the file and nothing of it", text, err)
		}
	}
}

// What TLS needs of each mode is there, and what it would ignore is not.
func TestTLSIsSaidWhole(t *testing.T) {
	ca, nothing := certificate(t), write(t, "not PEM")
	tls := func(keys string) string { return "registry: {tls: {" + keys + "}}" }
	judge(t, []accessCase{
		{"clients without TLS", tls("client_ca_file: " + ca), "registry.tls.client_ca_file", "none"},
		{"clients, internal", tls("mode: internal, client_ca_file: " + ca), "", ""},
		{"clients, files", tls("mode: files, cert_file: " + ca + ", key_file: " + ca + ", client_ca_file: " + ca), "", ""},
		{"clients, acme", tls("mode: acme, hosts: [a.example], client_ca_file: " + ca), "", ""},
		{"clients of nobody", tls("mode: internal, client_ca_file: /absent"), "registry.tls.client_ca_file", "no such file"},
		{"clients of nothing", tls("mode: internal, client_ca_file: " + nothing), "registry.tls.client_ca_file", "PEM"},

		{"acme", tls("mode: acme, hosts: [mirror.example]"), "", ""},
		{"acme, all of it", tls("mode: acme, hosts: [a.example, B.example], email: a@b.example, acme_directory: 'https://acme.example:14000/dir', acme_ca_file: " + ca + ", acme_http: '127.0.0.1:8080'"), "", ""},
		{"acme for nobody", tls("mode: acme"), "registry.tls.hosts", "names"},
		{"acme for none", tls("mode: acme, hosts: []"), "registry.tls.hosts", "names"},
		{"acme for an address", tls("mode: acme, hosts: [192.0.2.1]"), "registry.tls.hosts[0]", "host name"},
		{"acme for an address, v6", tls("mode: acme, hosts: [a.example, '2001:db8::1']"), "registry.tls.hosts[1]", "host name"},
		{"acme for a port", tls("mode: acme, hosts: ['a.example:443']"), "registry.tls.hosts[0]", "host name"},
		{"acme for all", tls("mode: acme, hosts: ['*.example']"), "registry.tls.hosts[0]", "host name"},
		{"acme for an URL", tls("mode: acme, hosts: ['https://a.example']"), "registry.tls.hosts[0]", "host name"},
		{"acme for nothing", tls("mode: acme, hosts: ['']"), "registry.tls.hosts[0]", "host name"},
		{"acme in the clear", tls("mode: acme, hosts: [a.example], acme_directory: 'http://acme.example/dir'"), "registry.tls.acme_directory", "https://"},
		{"acme nowhere", tls("mode: acme, hosts: [a.example], acme_directory: ''"), "registry.tls.acme_directory", "https://"},
		{"acme at a host", tls("mode: acme, hosts: [a.example], acme_directory: acme.example"), "registry.tls.acme_directory", "https://"},
		{"acme trusts nobody", tls("mode: acme, hosts: [a.example], acme_ca_file: /absent"), "registry.tls.acme_ca_file", "no such file"},
		{"acme trusts nothing", tls("mode: acme, hosts: [a.example], acme_ca_file: " + nothing), "registry.tls.acme_ca_file", "PEM"},
		{"acme is not answered", tls("mode: acme, hosts: [a.example], acme_http: '80'"), "registry.tls.acme_http", "address"},
		{"acme is answered nowhere", tls("mode: acme, hosts: [a.example], acme_http: ''"), "registry.tls.acme_http", "address"},
		{"acme with a certificate", tls("mode: acme, hosts: [a.example], cert_file: " + ca), "registry.tls.cert_file", "mode files"},
		{"acme with a key", tls("mode: acme, hosts: [a.example], key_file: " + ca), "registry.tls.key_file", "mode files"},

		{"email without acme", tls("mode: internal, email: a@b.example"), "registry.tls.email", "mode acme"},
		{"email without tls", tls("email: a@b.example"), "registry.tls.email", "mode acme"},
		{"trust without acme", tls("mode: internal, acme_ca_file: " + ca), "registry.tls.acme_ca_file", "mode acme"},
		{"hosts of files", tls("mode: files, cert_file: " + ca + ", key_file: " + ca + ", hosts: [a.example]"), "registry.tls.hosts", "internal"},
		{"hosts of none", tls("hosts: [a.example]"), "registry.tls.hosts", "acme"},
		{"hosts of internal", tls("mode: internal, hosts: [a.example, 192.0.2.1]"), "", ""},
		{"another mode", tls("mode: ACME"), "registry.tls.mode", "acme"},
	})
	tlsOf := mustParse(t, tls("mode: acme, hosts: [mirror.example]")).Registry.TLS
	if tlsOf.ACMEDirectory != "https://acme-v02.api.letsencrypt.org/directory" || tlsOf.ACMEHTTP != ":80" {
		t.Errorf("by default the ACME server is %s, answered at %s", tlsOf.ACMEDirectory, tlsOf.ACMEHTTP)
	}
	// A server with certificates of its own may be reached from elsewhere.
	mustParse(t, "registry: {listen: ':443', tls: {mode: acme, hosts: [mirror.example]}}")
}

// All that is wrong about access is told at once, by its lines.
func TestAllThatIsWrongAboutAccessIsTold(t *testing.T) {
	errs := refused(t, `registry:
  push: maybe
  auth:
    mode: some
    htpasswd_file: /absent
  tls:
    mode: none
    client_ca_file: /absent
    email: a@b.example
  intercept:
    tunnel: ['*']
upstreams:
  docker.io:
    docker_config: /absent
    username: a
`)
	var got []string
	for _, e := range errs {
		got = append(got, fmt.Sprintf("%d %s", e.Line, e.Path))
	}
	slices.Sort(got)
	want := []string{
		"11 registry.intercept.tunnel", "11 registry.intercept.tunnel[0]", "14 upstreams[docker.io].docker_config", "14 upstreams[docker.io].docker_config", "15 upstreams[docker.io].username",
		"2 registry.push", "4 registry.auth.mode", "5 registry.auth.htpasswd_file", "8 registry.tls.client_ca_file", "8 registry.tls.client_ca_file", "9 registry.tls.email",
	}
	if !slices.Equal(got, want) {
		t.Errorf("told is\n%v\nat %q\nwant %q", errs, got, want)
	}
}
