package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
)

// containerd, podman and a Docker daemon pull an image as of a time, each in the way in
// which it can be told to: a mirror with a path, a name, or a listener that is bound to
// the time. They get what the tag meant then, also when upstream has moved it twice and
// is gone; a build that is repeated by its lock file gets it, too.
func TestClientsPullAsOf(t *testing.T) {
	c := startContainerd(t)
	podman := need(t, "podman")
	if os.Geteuid() != 0 {
		skip(t, "podman without root needs more than a test can set up")
	}
	up := startRegistry(t)
	data, view := filepath.Join(t.TempDir(), "data"), freeAddr(t)
	s := serve(t, config(data, up.URL))
	old := up.push(t, "library/app:1", image(t, empty.Image, 2))
	must(t, s, "warm", "app:1")
	lock := filepath.Join(t.TempDir(), "images.lock")
	must(t, s, "lock", "app:1", "-o", lock)
	then := time.Now().UTC().Add(time.Second).Truncate(time.Second)
	time.Sleep(time.Until(then.Add(1100 * time.Millisecond))) // times in names are of seconds
	for range 2 {
		up.push(t, "library/app:1", image(t, empty.Image, 1))
		must(t, s, "warm", "app:1")
	}
	s.stop()
	up.Server.Close()
	stamp := strings.ToLower(then.Format("2006-01-02T15-04-05Z"))
	conf := strings.Replace(config(data, up.URL), `registry: {listen: "127.0.0.1:0"}`, fmt.Sprintf(`registry: {listen: "127.0.0.1:0", views: [{listen: "%s", asof: "%s"}]}`, view, then.Format(time.RFC3339)), 1)
	s = serve(t, conf)

	root := t.TempDir()
	hosts := filepath.Join(root, "etc/containerd/certs.d/docker.io/hosts.toml")
	if err := os.MkdirAll(filepath.Dir(hosts), 0o755); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("server = \"http://127.0.0.1:1\"\n[host.\"%s/asof/%s/v2\"]\n  capabilities = [\"pull\", \"resolve\"]\n  override_path = true\n", s.registry, stamp)
	if err := os.WriteFile(hosts, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := c.pull(root, "docker.io/library/app:1"); err != nil || !strings.Contains(out, old) {
		t.Errorf("containerd as of %s: %v\n%s\nwant %s", stamp, err, out, old)
	}

	conf = filepath.Join(root, "registries.conf")
	host := strings.TrimPrefix(s.registry, "http://")
	text = fmt.Sprintf("[[registry]]\nlocation = \"docker.io\"\n[[registry.mirror]]\nlocation = \"%[1]s/asof/%[2]s/docker.io\"\ninsecure = true\n[[registry]]\nlocation = \"%[1]s\"\ninsecure = true\n", host, stamp)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	dir := shortDir(t)
	run := func(args ...string) string {
		return command(t, []string{"CONTAINERS_REGISTRIES_CONF=" + conf}, podman, append([]string{"--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"), "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"}, args...)...)
	}
	var locked struct {
		Index  int64
		Images []struct{ Ref, Digest string }
	}
	b, err := os.ReadFile(lock)
	if err != nil || json.Unmarshal(b, &locked) != nil || len(locked.Images) != 1 || locked.Images[0].Digest != old {
		t.Fatalf("the lock file is %s, %v", b, err)
	}
	for _, name := range []string{
		"docker.io/library/app:1", host + "/asof/" + stamp + "/docker.io/library/app:1", fmt.Sprintf("%s/at/%d/docker.io/library/app:1", host, locked.Index),
	} {
		run("pull", name)
		if out := run("image", "inspect", "--format", "{{.Digest}}", name); strings.TrimSpace(out) != old {
			t.Errorf("podman has %s of %s, want %s", out, name, old)
		}
	}

	d := startDocker(t, `{"registry-mirrors": ["http://`+view+`"]}`)
	d.pull(old)
	if out, code := s.run("verify"); code != 0 || !strings.Contains(out, "consistent, 3 events") {
		t.Errorf("looking at the past is on the record:\n%s", out)
	}
}
