package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	gotoml "github.com/pelletier/go-toml/v2"

	"tidemark/proxy/admin"
)

// A clientConfig is what the files of one client say about where it pulls from.
type clientConfig struct {
	client string
	of     string // the upstream that it is about, "" for all
	file   string
	here   bool     // it comes here
	past   []string // where it goes when it gets no answer here, or a refusal
	cas    []string // the files of CAs that it trusts for us, by its own rules; nil if it needs none
	proxy  bool     // it comes by the intercepting proxy
	login  bool     // and with a name and a password
	err    error    // why the file could not be understood
}

// clients looks at the clients that are set up on this machine.
func (d *doctor) clients(ctx context.Context, r admin.RegistryStatus) []finding {
	var internal []byte
	if r.TLS == "internal" {
		var err error
		if internal, err = d.get(ctx, "/ca/internal.crt", nil); err != nil {
			internal = nil // told by what was tried before
		}
	}
	return clientFindings(d.root, d.address(r), r, internal)
}

// clientFindings looks at the clients that are set up below root, and tells whether
// they come to the registry, trust it, and can get past it. ca is what they must
// trust, nil if nothing of their own.
func clientFindings(root, registry string, r admin.RegistryStatus, ca []byte) []finding {
	u, err := url.Parse(registry)
	if err != nil {
		return nil // told before
	}
	var configs []clientConfig
	for _, look := range []func(root, host string, r admin.RegistryStatus) []clientConfig{
		dockerConfigs, containerdConfigs, containersConfigs, buildkitConfigs, k3sConfigs,
	} {
		configs = append(configs, look(root, u.Host, r)...)
	}
	var found []finding
	here := make(map[string][]string) // upstreams, by what is said of all of them
	var order []string
	say := func(c clientConfig, what string) {
		if _, said := here[what]; !said {
			order = append(order, what)
		}
		if c.of != "" {
			here[what] = append(here[what], c.of)
		} else {
			here[what] = append(here[what], c.file)
		}
	}
	for _, c := range configs {
		switch {
		case c.err != nil:
			found = append(found, bad("client", "%s: %s cannot be understood: %v", c.client, c.file, c.err))
			continue
		case !c.here:
			continue
		case len(c.past) > 0:
			say(c, "note bypass "+c.client+" comes here, and goes to the registry itself, or another mirror, when this server does not answer, says 404 or refuses a login: no rule holds back what it gets there")
		default:
			say(c, "ok client "+c.client+" comes here, and to nobody else")
		}
		if c.proxy && r.Auth == "basic" && !c.login {
			found = append(found, bad("client", "%s (%s) has no name and password for the proxy, and is refused (registry.auth.mode: basic)", c.client, c.file))
		}
		if wrong := untrusted(root, c, ca); wrong != "" {
			found = append(found, bad("client", "%s (%s) does not trust this server's CA: %s; tidemark setup installs it", c.client, c.file, wrong))
		}
	}
	for _, what := range order {
		grade, rest, _ := strings.Cut(what, " ")
		kind, says, _ := strings.Cut(rest, " ")
		f := good(kind, "%s (%s)", says, strings.Join(here[what], ", "))
		f.Note = grade == "note"
		found = append(found, f)
	}
	if len(order) == 0 {
		found = append(found, remark("client", "no client on this machine is set up to come to %s; tidemark setup does that", u.Host))
	}
	return found
}

// untrusted is why a client does not trust the CA, "" if it does or need not.
func untrusted(root string, c clientConfig, ca []byte) string {
	if ca == nil || c.cas == nil {
		return ""
	}
	for _, file := range c.cas {
		data, err := os.ReadFile(filepath.Join(root, file))
		if err == nil && bytes.Contains(data, bytes.TrimSpace(ca)) {
			return ""
		}
	}
	return strings.Join(c.cas, " or ") + " is not there, or holds another one"
}

// readFile reads a file of a client; one that is not there is nothing.
func readFile(path string, understand func([]byte) error) error {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return understand(data)
}

// dockerConfigs looks at daemon.json, and at the variables of the service.
func dockerConfigs(root, host string, r admin.RegistryStatus) []clientConfig {
	daemon := clientConfig{client: "docker", file: filepath.Join(root, "etc/docker/daemon.json")}
	daemon.err = readFile(daemon.file, func(data []byte) error {
		var c struct {
			Mirrors []string `json:"registry-mirrors"`
		}
		if len(strings.TrimSpace(string(data))) == 0 {
			return nil
		}
		if err := json.Unmarshal(data, &c); err != nil {
			return err
		}
		daemon.here = slices.ContainsFunc(c.Mirrors, func(m string) bool { return isHost(m, host) })
		daemon.past = []string{"Docker Hub"} // always
		daemon.cas = []string{filepath.Join("etc/docker/certs.d", host, "ca.crt")}
		return nil
	})
	configs := []clientConfig{daemon}
	units, _ := filepath.Glob(filepath.Join(root, "etc/systemd/system/docker.service.d/*.conf")) // the pattern is well formed
	for _, file := range units {
		c := clientConfig{client: "docker, by the proxy,", file: file, proxy: true}
		c.err = readFile(file, func(data []byte) error {
			c.here = r.Intercept != "" && strings.Contains(string(data), "HTTPS_PROXY=http") && strings.Contains(string(data), portOf(r.Intercept))
			_, after, _ := strings.Cut(string(data), "HTTPS_PROXY=")
			address, _, _ := strings.Cut(after, "\n")
			c.login = strings.Contains(address, "@")
			return nil
		})
		if c.here || c.err != nil {
			configs = append(configs, c)
		}
	}
	return configs
}

// isHost tells whether the address of a mirror is that of the registry.
func isHost(address, host string) bool {
	if u, err := url.Parse(address); err == nil && u.Host != "" {
		return u.Host == host
	}
	first, _, _ := strings.Cut(address, "/")
	return first == host
}

func portOf(addr string) string {
	return addr[strings.LastIndexByte(addr, ':'):]
}

// containerdConfigs looks at every hosts.toml: containerd's, and Docker's with the
// containerd image store.
func containerdConfigs(root, host string, _ admin.RegistryStatus) (configs []clientConfig) {
	for _, client := range []string{"containerd", "docker"} {
		files, _ := filepath.Glob(filepath.Join(root, "etc", client, "certs.d/*/hosts.toml")) // the pattern is well formed
		for _, file := range files {
			configs = append(configs, hostsConfig(client, file, host))
		}
	}
	return configs
}

func hostsConfig(client, file, host string) clientConfig {
	upstream := filepath.Base(filepath.Dir(file))
	c := clientConfig{client: client, of: upstream, file: file}
	c.err = readFile(file, func(data []byte) error {
		var t struct {
			Server string `toml:"server"`
			CA     any    `toml:"ca"`
			Host   map[string]struct {
				Capabilities []string `toml:"capabilities"`
				CA           any      `toml:"ca"`
			} `toml:"host"`
		}
		if err := gotoml.Unmarshal(data, &t); err != nil {
			return err
		}
		for h, is := range t.Host {
			pulls := is.Capabilities == nil || slices.Contains(is.Capabilities, "pull") || slices.Contains(is.Capabilities, "resolve")
			switch {
			case isHost(h, host):
				c.here, c.cas = true, texts(is.CA)
			case pulls:
				c.past = append(c.past, h)
			}
		}
		switch {
		case isHost(t.Server, host):
			c.here, c.cas = true, texts(t.CA)
		case t.Server == "":
			c.past = append(c.past, upstream)
		default:
			c.past = append(c.past, t.Server)
		}
		slices.Sort(c.past)
		return nil
	})
	return c
}

// texts reads a text or a list of them. Without one the system's CAs are trusted,
// among which we do not look.
func texts(v any) (out []string) {
	switch v := v.(type) {
	case string:
		out = []string{v}
	case []any:
		for _, e := range v {
			if s, ok := e.(string); ok {
				out = append(out, s)
			}
		}
	}
	return out
}

// containersConfigs looks at registries.conf and what is added to it: podman,
// CRI-O, Buildah, Skopeo.
func containersConfigs(root, host string, _ admin.RegistryStatus) []clientConfig {
	files, _ := filepath.Glob(filepath.Join(root, "etc/containers/registries.conf.d/*.conf")) // the pattern is well formed
	files = append([]string{filepath.Join(root, "etc/containers/registries.conf")}, files...)
	var configs []clientConfig
	for _, file := range files {
		var t struct {
			Registry []struct {
				Prefix   string `toml:"prefix"`
				Location string `toml:"location"`
				Mirror   []struct {
					Location string `toml:"location"`
				} `toml:"mirror"`
			} `toml:"registry"`
		}
		err := readFile(file, func(data []byte) error { return gotoml.Unmarshal(data, &t) })
		if err != nil {
			configs = append(configs, clientConfig{client: "podman and CRI-O", file: file, err: err})
		}
		for _, r := range t.Registry {
			c := clientConfig{
				client: "podman and CRI-O", of: r.Prefix, file: file, here: isHost(r.Location, host),
				cas: []string{filepath.Join("etc/containers/certs.d", host, "ca.crt"), filepath.Join("etc/docker/certs.d", host, "ca.crt")},
			}
			for _, m := range r.Mirror {
				if isHost(m.Location, host) {
					c.here = true
				} else {
					c.past = append(c.past, m.Location)
				}
			}
			if !isHost(r.Location, host) {
				c.past = append(c.past, r.Location)
			}
			configs = append(configs, c)
		}
	}
	return configs
}

// buildkitConfigs looks at buildkitd.toml. BuildKit always goes to the registry
// itself when its mirrors fail.
func buildkitConfigs(root, host string, _ admin.RegistryStatus) (configs []clientConfig) {
	file := filepath.Join(root, "etc/buildkit/buildkitd.toml")
	var t struct {
		Registry map[string]struct {
			Mirrors []string `toml:"mirrors"`
		} `toml:"registry"`
	}
	if err := readFile(file, func(data []byte) error { return gotoml.Unmarshal(data, &t) }); err != nil {
		return []clientConfig{{client: "buildkit", file: file, err: err}}
	}
	for _, name := range slices.Sorted(maps.Keys(t.Registry)) {
		if slices.ContainsFunc(t.Registry[name].Mirrors, func(m string) bool { return isHost(m, host) }) {
			configs = append(configs, clientConfig{client: "buildkit", of: name, file: file, here: true, past: []string{name}})
		}
	}
	return configs
}

// k3sConfigs looks at registries.yaml, and whether k3s may go to the registries
// themselves.
func k3sConfigs(root, host string, _ admin.RegistryStatus) (configs []clientConfig) {
	dir := filepath.Join(root, "etc/rancher/k3s")
	file := filepath.Join(dir, "registries.yaml")
	var t struct {
		Mirrors map[string]struct {
			Endpoint []string `yaml:"endpoint"`
		} `yaml:"mirrors"`
	}
	if err := readFile(file, func(data []byte) error { return yaml.Unmarshal(data, &t) }); err != nil {
		return []clientConfig{{client: "k3s", file: file, err: err}}
	}
	closed := false
	more, _ := filepath.Glob(filepath.Join(dir, "config.yaml.d/*.yaml")) // the pattern is well formed
	for _, name := range append([]string{filepath.Join(dir, "config.yaml")}, more...) {
		var k map[string]any
		if err := readFile(name, func(data []byte) error { return yaml.Unmarshal(data, &k) }); err != nil {
			configs = append(configs, clientConfig{client: "k3s", file: name, err: err})
		}
		if is, ok := k["disable-default-registry-endpoint"].(bool); ok {
			closed = is
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.Mirrors)) {
		c := clientConfig{client: "k3s", of: name, file: file}
		for _, e := range t.Mirrors[name].Endpoint {
			if isHost(e, host) {
				c.here = true
			} else {
				c.past = append(c.past, e)
			}
		}
		if !closed {
			c.past = append(c.past, name)
		}
		configs = append(configs, c)
	}
	return configs
}
