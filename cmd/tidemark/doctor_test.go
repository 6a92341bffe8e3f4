package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/proxy/admin"
)

// Whether clients come here, and can get past, is read from what they are set up
// with, each in its own way; what is somebody else's is passed over, and what cannot
// be understood is told.
func TestClientsThatCanGetPast(t *testing.T) {
	const host = "mirror.example:5050"
	for _, c := range []struct {
		name, path, text string
		want             string // what is told, with its grade
	}{
		{"docker", "etc/docker/daemon.json", `{"registry-mirrors": ["https://mirror.example:5050"]}`, "note bypass docker comes here"},
		{"docker, another mirror", "etc/docker/daemon.json", `{"registry-mirrors": ["https://other.example"]}`, "note client no client"},
		{"docker, broken", "etc/docker/daemon.json", `{`, "WRONG client docker"},
		{"docker's proxy", "etc/systemd/system/docker.service.d/tidemark.conf", "[Service]\nEnvironment=\"HTTPS_PROXY=http://mirror.example:5052\"\n", "ok client docker, by the proxy, comes here, and to nobody else"},
		{"containerd", "etc/containerd/certs.d/ghcr.io/hosts.toml", "server = \"https://ghcr.io\"\n[host.\"https://mirror.example:5050\"]\ncapabilities = [\"pull\"]\n", "note bypass containerd comes here"},
		{"containerd, closed", "etc/containerd/certs.d/ghcr.io/hosts.toml", "server = \"https://mirror.example:5050\"\n[host.\"https://ghcr.io\"]\ncapabilities = [\"push\"]\n", "ok client containerd comes here, and to nobody else (ghcr.io)"},
		{"containerd, another mirror, too", "etc/containerd/certs.d/ghcr.io/hosts.toml", "server = \"https://mirror.example:5050\"\n[host.\"https://other.example\"]\n", "note bypass containerd comes here"},
		{"docker with the containerd store", "etc/docker/certs.d/ghcr.io/hosts.toml", "server = \"https://mirror.example:5050\"\n", "ok client docker comes here, and to nobody else (ghcr.io)"},
		{"podman", "etc/containers/registries.conf.d/50-tidemark.conf", "[[registry]]\nprefix = \"ghcr.io\"\nlocation = \"ghcr.io\"\n[[registry.mirror]]\nlocation = \"mirror.example:5050/ghcr.io\"\n", "note bypass podman and CRI-O comes here"},
		{"podman, closed", "etc/containers/registries.conf", "[[registry]]\nprefix = \"ghcr.io\"\nlocation = \"mirror.example:5050/ghcr.io\"\n", "ok client podman and CRI-O comes here, and to nobody else (ghcr.io)"},
		{"buildkit", "etc/buildkit/buildkitd.toml", "[registry.\"ghcr.io\"]\nmirrors = [\"mirror.example:5050\"]\n", "note bypass buildkit comes here"},
		{"k3s", "etc/rancher/k3s/registries.yaml", "mirrors:\n  ghcr.io:\n    endpoint: [\"https://mirror.example:5050\"]\n", "note bypass k3s comes here"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			write(t, filepath.Join(root, c.path), c.text)
			var told []string
			for _, f := range clientFindings(root, "https://"+host, admin.RegistryStatus{Intercept: "0.0.0.0:5052"}, nil) {
				grade := map[[2]bool]string{{true, false}: "ok", {true, true}: "note", {false, false}: "WRONG"}[[2]bool{f.OK, f.Note}]
				told = append(told, grade+" "+f.What+" "+f.Says)
			}
			if len(told) == 0 || !strings.HasPrefix(told[0], c.want) {
				t.Errorf("told is\n%s\nwant %s", strings.Join(told, "\n"), c.want)
			}
		})
	}
}

// k3s that was told to go nowhere else has no way past.
func TestK3sThatIsClosed(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(root, "etc/rancher/k3s/registries.yaml"), "mirrors:\n  ghcr.io:\n    endpoint: [\"https://mirror.example:5050\"]\n")
	write(t, filepath.Join(root, "etc/rancher/k3s/config.yaml.d/50-tidemark.yaml"), "disable-default-registry-endpoint: true\n")
	found := clientFindings(root, "https://mirror.example:5050", admin.RegistryStatus{}, nil)
	if len(found) != 1 || found[0].Note || !found[0].OK {
		t.Errorf("found is %+v, want that it goes nowhere else", found)
	}
}

// A client that would be refused is told, whatever else is right about it: one that
// trusts another CA, or none, and one without a login for the proxy.
func TestClientsThatWouldBeRefused(t *testing.T) {
	const toml = "server = \"https://mirror.example:5050\"\nca = \"/etc/containerd/certs.d/tidemark-ca.crt\"\n"
	for _, c := range []struct {
		name  string
		files map[string]string
		wrong string // "" for nothing
	}{
		{"no CA", map[string]string{"etc/containerd/certs.d/ghcr.io/hosts.toml": toml}, "does not trust"},
		{"another CA", map[string]string{"etc/containerd/certs.d/ghcr.io/hosts.toml": toml, "etc/containerd/certs.d/tidemark-ca.crt": "another"}, "does not trust"},
		{"the CA", map[string]string{"etc/containerd/certs.d/ghcr.io/hosts.toml": toml, "etc/containerd/certs.d/tidemark-ca.crt": "others\nthe CA\n"}, ""},
		{"podman without it", map[string]string{"etc/containers/registries.conf": "[[registry]]\nprefix = \"ghcr.io\"\nlocation = \"mirror.example:5050/ghcr.io\"\n"}, "does not trust"},
		{"no login for the proxy", map[string]string{"etc/systemd/system/docker.service.d/x.conf": "Environment=\"HTTPS_PROXY=http://mirror.example:5052\"\n"}, "no name and password"},
		{"a login for the proxy", map[string]string{"etc/systemd/system/docker.service.d/x.conf": "Environment=\"HTTPS_PROXY=http://a:b@mirror.example:5052\"\n"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			for path, text := range c.files {
				write(t, filepath.Join(root, path), text)
			}
			wrong := ""
			for _, f := range clientFindings(root, "https://mirror.example:5050", admin.RegistryStatus{Auth: "basic", Intercept: "0.0.0.0:5052"}, []byte("the CA\n")) {
				if !f.OK {
					wrong += f.Says
				}
			}
			if (wrong == "") != (c.wrong == "") || !strings.Contains(wrong, c.wrong) {
				t.Errorf("told is %q, want %q", wrong, c.wrong)
			}
		})
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
