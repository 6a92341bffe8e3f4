package main

import (
	"strings"
	"testing"
)

// writes sets a client up in a folder, and returns what is in it then.
func writes(t *testing.T, root string, args ...string) map[string]string {
	t.Helper()
	mustSetup(t, append(args, "--write", "--root", root)...)
	return tree(t, root)
}

// want compares the files of a client with what they must be.
func want(t *testing.T, files map[string]string, wants map[string]string) {
	t.Helper()
	for path, text := range wants {
		if files[path] != text {
			t.Errorf("%s is\n%s\nwant\n%s", path, files[path], text)
		}
	}
}

// Docker is told of the mirror; over plain HTTP from elsewhere that it is plain;
// over TLS whom to trust, in the way of each of its image stores.
func TestSetupDocker(t *testing.T) {
	config := siteConfig(t, "")
	want(t, writes(t, t.TempDir(), "docker", "-c", config), map[string]string{
		"/etc/docker/daemon.json":                              "{\n  \"registry-mirrors\": [\"http://127.0.0.1:5050\"]\n}\n",
		"/etc/docker/certs.d/registry.example:5000/hosts.toml": written + "server = \"http://10.0.0.1:5000\"\n\n[host.\"http://127.0.0.1:5050\"]\n  capabilities = [\"pull\", \"resolve\"]\n  dial_timeout = \"3s\"\n",
	})
	want(t, writes(t, t.TempDir(), "docker", "-c", config, "--registry", "http://mirror.example:5050/"), map[string]string{
		"/etc/docker/daemon.json": "{\n  \"registry-mirrors\": [\"http://mirror.example:5050\"],\n  \"insecure-registries\": [\"mirror.example:5050\"]\n}\n",
	})
	pem := testCA(t, "test")
	ca := put(t, t.TempDir(), "ca.crt", pem)
	want(t, writes(t, t.TempDir(), "docker", "-c", config, "--registry", "https://mirror.example:5050", "--ca", ca), map[string]string{
		"/etc/docker/daemon.json":                        "{\n  \"registry-mirrors\": [\"https://mirror.example:5050\"]\n}\n",
		"/etc/docker/certs.d/mirror.example:5050/ca.crt": pem,
		"/etc/docker/certs.d/ghcr.io/hosts.toml": written + "server = \"https://ghcr.io\"\n\n[host.\"https://mirror.example:5050\"]\n" +
			"  capabilities = [\"pull\", \"resolve\"]\n  dial_timeout = \"3s\"\n  ca = \"/etc/docker/certs.d/mirror.example:5050/ca.crt\"\n",
	})
}

// Docker's proxy is the intercepting one, and its CA is trusted for the hosts of
// the upstreams, beside whatever else is trusted for them.
func TestSetupDockerIntercept(t *testing.T) {
	config := siteConfig(t, `listen: "0.0.0.0:5050", tls: {mode: internal, hosts: [mirror.example]}, intercept: {listen: "0.0.0.0:5052"}`)
	pem, other := testCA(t, "ours"), testCA(t, "another")
	ca := put(t, t.TempDir(), "ca.crt", pem)
	root := t.TempDir()
	put(t, root, "etc/docker/certs.d/ghcr.io/ca.crt", strings.TrimSpace(other))
	files := writes(t, root, "docker", "--intercept", "-c", config, "--ca", ca)
	want(t, files, map[string]string{
		"/etc/systemd/system/docker.service.d/tidemark.conf": written + `[Service]
Environment="HTTPS_PROXY=http://mirror.example:5052"
Environment="NO_PROXY=localhost,127.0.0.1,::1,mirror.example"
Environment="SSL_CERT_DIR=/etc/ssl/certs:/etc/pki/tls/certs:/etc/docker/tidemark"
`,
		"/etc/docker/certs.d/ghcr.io/ca.crt":               other + pem,
		"/etc/docker/certs.d/registry-1.docker.io/ca.crt":  pem,
		"/etc/docker/certs.d/old.example/ca.crt":           pem,
		"/etc/docker/certs.d/registry.example:5000/ca.crt": pem,
		"/etc/docker/tidemark/ca.crt":                      pem,
	})

	files = writes(t, t.TempDir(), "docker", "--intercept", "-c", config, "--ca", ca, "--upstream", "ghcr.io", "--proxy", "http://u:p%25w@10.0.0.1:5052")
	want(t, files, map[string]string{
		"/etc/systemd/system/docker.service.d/tidemark.conf": written + `[Service]
Environment="HTTPS_PROXY=http://u:p%%25w@10.0.0.1:5052"
Environment="NO_PROXY=localhost,127.0.0.1,::1,mirror.example"
`,
		"/etc/docker/tidemark/ca.crt": "",
	})
	if out := mustSetup(t, "docker", "--intercept", "-c", config, "--registry", "https://10.0.0.9:5050"); !strings.Contains(out, "HTTPS_PROXY=http://10.0.0.9:5052") {
		t.Errorf("the proxy is not where --registry says the server is:\n%s", out)
	}

	for path, text := range map[string]string{
		"etc/docker/daemon.json":                               "{\n  \"proxies\": {}}",
		"etc/systemd/system/docker.service.d/http-proxy.conf":  "[Service]\nEnvironment=\"https_proxy=http://corporate.example\"\n",
		"etc/systemd/system/docker.service.d/http-proxy2.conf": "[Service]\nEnvironment=A=b SSL_CERT_DIR=/x\n",
		"etc/docker/certs.d/ghcr.io/ca.crt":                    "nothing",
	} {
		root := t.TempDir()
		at := put(t, root, path, text)
		if _, _, err := runSetup(t, "docker", "--intercept", "-c", config, "--ca", ca, "--write", "--root", root); err == nil || !strings.Contains(err.Error(), at+": ") {
			t.Errorf("with %s = %q it is %v, want it refused", path, text, err)
		}
	}
}

// containerd has a hosts.toml for each upstream, which leads past the server only
// if that is wanted.
func TestSetupContainerd(t *testing.T) {
	pem := testCA(t, "test")
	ca := put(t, t.TempDir(), "ca.crt", pem)
	config := siteConfig(t, "")
	const dir = "/etc/containerd/certs.d/"
	files := writes(t, t.TempDir(), "containerd", "-c", config)
	want(t, files, map[string]string{
		dir + "docker.io/hosts.toml": written + "server = \"https://registry-1.docker.io\"\n\n[host.\"http://127.0.0.1:5050\"]\n  capabilities = [\"pull\", \"resolve\"]\n  dial_timeout = \"3s\"\n",
	})
	if len(files) != 3 {
		t.Errorf("there are %d files, want one for each upstream", len(files))
	}
	want(t, writes(t, t.TempDir(), "containerd", "-c", config, "--registry", "https://mirror.example", "--ca", ca, "--no-fallback"), map[string]string{
		dir + "tidemark-ca.crt": pem,
		dir + "ghcr.io/hosts.toml": written + "server = \"https://mirror.example\"\ndial_timeout = \"3s\"\nca = \"" + dir + "tidemark-ca.crt\"\n\n" +
			"# Pushes go to the registry itself.\n[host.\"https://ghcr.io\"]\n  capabilities = [\"push\"]\n",
	})
}

// A hosts.toml of somebody else, and certificates that one would hide, are in the
// way of --write, but not of --force, which keeps a backup.
func TestSetupForceReplaces(t *testing.T) {
	root := t.TempDir()
	const theirs = "server = \"https://elsewhere.example\"\n"
	at := put(t, root, "etc/containerd/certs.d/ghcr.io/hosts.toml", theirs)
	put(t, root, "etc/containerd/certs.d/docker.io/client.cert", "x")
	args := []string{"containerd", "-c", siteConfig(t, ""), "--write", "--root", root}
	_, _, err := runSetup(t, args...)
	if err == nil || !strings.Contains(err.Error(), at+": this is somebody else's") || !strings.Contains(err.Error(), "docker.io/client.cert") {
		t.Fatalf("setup = %v, want both refused", err)
	}
	out := mustSetup(t, append(args, "--force")...)
	kept := 0
	for path, text := range tree(t, root) {
		if strings.Contains(path, "hosts.toml.tidemark-backup-") && text == theirs {
			kept++
		}
	}
	if kept != 1 || strings.Count(out, "(backup ") != 1 {
		t.Errorf("%d backups have what was there, want one:\n%s", kept, out)
	}
}

// podman and CRI-O have a [[registry]] for each upstream. What may be done without
// TLS is said of this server only, never of a registry that pushes go to.
func TestSetupPodman(t *testing.T) {
	config := siteConfig(t, "")
	const dropIn = "/etc/containers/registries.conf.d/50-tidemark.conf"
	const docker, ghcr = "\n[[registry]]\nprefix = \"docker.io\"\nlocation = ", "\n[[registry]]\nprefix = \"ghcr.io\"\nlocation = "
	plain := func(name string) string {
		return "\n[[registry.mirror]]\nlocation = \"127.0.0.1:5050/" + name + "\"\ninsecure = true\n"
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, docker + "\"docker.io\"\n" + plain("docker.io") + ghcr + "\"ghcr.io\"\n" + plain("ghcr.io")},
		{[]string{"--no-fallback"}, docker + "\"127.0.0.1:5050/docker.io\"\n" + plain("docker.io") + ghcr + "\"127.0.0.1:5050/ghcr.io\"\n" + plain("ghcr.io")},
		{[]string{"--registry", "https://m.example"}, docker + "\"docker.io\"\n\n[[registry.mirror]]\nlocation = \"m.example/docker.io\"\n" + ghcr + "\"ghcr.io\"\n\n[[registry.mirror]]\nlocation = \"m.example/ghcr.io\"\n"},
		{[]string{"--registry", "https://m.example", "--no-fallback"}, docker + "\"m.example/docker.io\"\n" + ghcr + "\"m.example/ghcr.io\"\n"},
	} {
		for _, client := range []string{"podman", "crio"} {
			want(t, writes(t, t.TempDir(), append([]string{client, "-c", config}, c.args...)...), map[string]string{dropIn: written + c.want})
		}
	}
	if out := mustSetup(t, "podman", "-c", config); !strings.Contains(out, "Left out, and pulled from the registry itself: registry.example:5000") {
		t.Errorf("it is not said that an upstream with a port was left out:\n%s", out)
	}
}

// Of two files with the same [[registry]] only one would count, so another's is in
// the way; other registries, and files that are not read, are not.
func TestSetupPodmanFindsOtherRegistries(t *testing.T) {
	config := siteConfig(t, "")
	for _, c := range []struct{ path, text, says string }{
		{"registries.conf", "unqualified-search-registries = [\"docker.io\"]\n", ""},
		{"registries.conf", "[[registry]]\nlocation = \"docker.io\"\n", "[[registry]] for docker.io already"},
		{"registries.conf.d/99-x.conf", "[[registry]]\nlocation = \"m.example\"\nprefix = \"ghcr.io\"\n", "[[registry]] for ghcr.io already"},
		{"registries.conf.d/99-x.conf", "[[registry]]\nlocation = \"ghcr.io\"\nprefix = \"a.example\"\n", ""},
		{"registries.conf.d/99-x.conf", "[[registry]]\nlocation = \"docker.io/org\"\n", ""},
		{"registries.conf.d/99-x.conf", "[[registry\n", "line 1, column 11: this is no TOML"},
		{"registries.conf.d/99-x.conf.bak", "[[registry]]\nlocation = \"docker.io\"\n", ""},
		{"registries.conf.d/50-tidemark.conf", "[[registry]]\nlocation = \"docker.io\"\n", "this is somebody else's"},
	} {
		root := t.TempDir()
		at := put(t, root, "etc/containers/"+c.path, c.text)
		_, code, err := runSetup(t, "podman", "-c", config, "--write", "--root", root)
		switch {
		case c.says == "" && code != 0:
			t.Errorf("%s with %q: %v", c.path, c.text, err)
		case c.says != "" && (err == nil || !strings.Contains(err.Error(), at+": ") || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s with %q: %v, want it refused with %q", c.path, c.text, err, c.says)
		}
	}
}

// BuildKit's block is put at the end, and in its own place again; what is around it
// stays, and what says the same elsewhere is refused.
func TestSetupBuildKit(t *testing.T) {
	const block = blockBegin + "\n[registry.\"docker.io\"]\n  mirrors = [\"127.0.0.1:5050\"]\n\n[registry.\"127.0.0.1:5050\"]\n  http = true\n" + blockEnd + "\n"
	const older = blockBegin + "\n[registry.\"ghcr.io\"]\n" + blockEnd + "\n"
	names := []string{"docker.io", "127.0.0.1:5050"}
	for _, c := range []struct{ name, old, want string }{
		{"no file", "", block},
		{"others", "debug = true # x\n[registry.\"ghcr.io\"]\n  http = true\n", "debug = true # x\n[registry.\"ghcr.io\"]\n  http = true\n\n" + block},
		{"no line end", "debug = true", "debug = true\n\n" + block},
		{"the same block", "a = 1\n\n" + block + "[b]\n", "a = 1\n\n" + block + "[b]\n"},
		{"an older block", "a = 1\n" + older + "[b]\nc = 2", "a = 1\n" + block + "[b]\nc = 2"},
	} {
		got, err := editBuildKit([]byte(c.old), block, names)
		if err != nil || string(got) != c.want {
			t.Errorf("%s: %v\n%s\nwant\n%s", c.name, err, got, c.want)
		}
		if again, err := editBuildKit(got, block, names); err != nil || string(again) != string(got) {
			t.Errorf("%s: a second time it becomes %v\n%s", c.name, err, again)
		}
	}
	for _, c := range []struct{ old, says string }{
		{"[registry.\"docker.io\"]\nmirrors = []\n", "there is a [registry.\"docker.io\"] already"},
		{"[registry]\n'docker.io'.http = true\n", "there is a [registry.\"docker.io\"] already"},
		{"registry = {\"127.0.0.1:5050\" = {http = true}}\n", "there is a [registry.\"127.0.0.1:5050\"] already"},
		{"registry = {}\n", "the block cannot be added"},
		{"a = \n", "line 1, column 5: this is no TOML"},
		{blockBegin + "\n", "has no"},
		{blockEnd + "\n", "ends nothing"},
		{block + block, "is there twice"},
	} {
		if got, err := editBuildKit([]byte(c.old), block, names); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q became %v\n%s\nwant it refused with %q", c.old, err, got, c.says)
		}
	}
	pem := testCA(t, "test")
	ca := put(t, t.TempDir(), "ca.crt", pem)
	want(t, writes(t, t.TempDir(), "buildkit", "-c", siteConfig(t, ""), "--upstream", "ghcr.io", "--registry", "https://m.example:1", "--ca", ca), map[string]string{
		buildkitCA:     pem,
		buildkitConfig: blockBegin + "\n[registry.\"ghcr.io\"]\n  mirrors = [\"m.example:1\"]\n\n[registry.\"m.example:1\"]\n  http = false\n  ca = [\"" + buildkitCA + "\"]\n" + blockEnd + "\n",
	})
}

// k3s goes to the server for each upstream, and with --no-fallback to nobody else.
func TestSetupK3s(t *testing.T) {
	pem := testCA(t, "test")
	ca := put(t, t.TempDir(), "ca.crt", pem)
	want(t, writes(t, t.TempDir(), "k3s", "-c", siteConfig(t, ""), "--upstream", "ghcr.io", "--registry", "https://m.example:1", "--ca", ca, "--no-fallback"), map[string]string{
		k3sCA:         pem,
		k3sRegistries: "mirrors:\n  \"ghcr.io\":\n    endpoint:\n      - \"https://m.example:1\"\nconfigs:\n  \"m.example:1\":\n    tls:\n      ca_file: \"" + k3sCA + "\"\n",
		k3sDropIn:     written + "disable-default-registry-endpoint: true\n",
	})
}
