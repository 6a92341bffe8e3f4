package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"tidemark/proxy/upstream/upstreamtest"
)

// A site is tidemark in front of two real registries, docker.io and ghcr.io, with
// an image in each.
type site struct {
	*server
	t         *testing.T
	data      string
	hub, ghcr *realRegistry
	images    []string // by the names that users know
	digests   []string
}

// newSite starts a site; more is added to the configuration of the registry.
func newSite(t *testing.T, more string) *site {
	t.Helper()
	s := &site{t: t, data: filepath.Join(t.TempDir(), "data"), hub: startRegistry(t), ghcr: startRegistry(t)}
	s.images = []string{"docker.io/library/app:1", "ghcr.io/org/app:1"}
	s.digests = []string{s.hub.push(t, "library/app:1", image(t, empty.Image, 2)), s.ghcr.push(t, "org/app:1", image(t, empty.Image, 3))}
	s.server = serve(t, fmt.Sprintf(`data: %s
registry: {listen: "127.0.0.1:0"%s}
admin: {listen: "127.0.0.1:0"}
tags: {ttl: 0s}
upstreams:
  docker.io: {endpoints: ["%s"], hosts: [registry-1.docker.io]}
  ghcr.io: {endpoints: ["%s"]}
`, s.data, more, s.hub.URL, s.ghcr.URL))
	return s
}

// host is the address without its scheme.
func (s *site) host() string { return strings.TrimPrefix(s.registry, "http://") }

// setUp runs tidemark setup for a client whose files are below the folder that it
// returns.
func (s *site) setUp(args ...string) string {
	s.t.Helper()
	root := s.t.TempDir()
	out, code := s.run(append([]string{"setup"}, append(args, "-c", s.config, "--registry", s.registry, "--write", "--root", root)...)...)
	if code != 0 {
		s.t.Fatalf("tidemark setup %s: exit %d\n%s", strings.Join(args, " "), code, out)
	}
	return root
}

// gone closes both upstreams.
func (s *site) gone() {
	s.hub.Server.Close()
	s.ghcr.Server.Close()
}

// wentThrough wants both images to have been resolved through tidemark, and none
// of their blobs twice.
func (s *site) wentThrough() {
	s.t.Helper()
	for _, ref := range s.images {
		if out, _ := s.run("log", ref); !strings.Contains(out, "tag.first_seen  "+ref) {
			s.t.Errorf("%s was not pulled through tidemark:\n%s", ref, out)
		}
	}
	for _, r := range []*realRegistry{s.hub, s.ghcr} {
		seen := make(map[string]int)
		r.mu.Lock()
		for _, a := range r.asked {
			if seen[a]++; strings.HasPrefix(a, "GET") && strings.Contains(a, "/blobs/") && seen[a] > 1 {
				s.t.Errorf("upstream was asked for %s %d times", a, seen[a])
			}
		}
		r.mu.Unlock()
	}
}

// command runs a program with variables of the environment, and wants it to
// succeed.
func command(t *testing.T, env []string, program string, args ...string) string {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", filepath.Base(program), strings.Join(args, " "), err, out)
	}
	return string(out)
}

// A Docker daemon whose proxy is tidemark pulls from two registries under their
// own names, twice, the second time with both gone; what is not an upstream it
// cannot reach.
func TestDockerReachesEveryRegistryThroughTheProxy(t *testing.T) {
	addr := freeAddr(t)
	s := newSite(t, `, intercept: {listen: "`+addr+`"}`)
	ca := filepath.Join(s.data, "tls", "intercept-ca.crt")
	d := startDocker(t, "{}", "HTTPS_PROXY=http://"+addr, "SSL_CERT_FILE="+ca)
	for range 2 {
		for i, ref := range s.images {
			if out := d.run("pull", ref); !strings.Contains(out, s.digests[i]) {
				t.Errorf("docker pull %s got another image than %s:\n%s", ref, s.digests[i], out)
			}
			d.run("rmi", ref)
		}
		s.wentThrough()
		s.gone()
	}
	out, err := d.command("pull", "quay.io/org/app:1").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "Forbidden") {
		t.Errorf("docker pull of what is no upstream = %v\n%s\nwant it refused", err, out)
	}
	if !strings.Contains(s.log.String(), "quay.io:443") {
		t.Errorf("the server's log does not say what was refused:\n%s", s.log)
	}
}

// A containerd is one of the story's own.
type containerd struct {
	t         *testing.T
	ctr, sock string
}

func startContainerd(t *testing.T) *containerd {
	t.Helper()
	program, ctr := need(t, "containerd"), need(t, "ctr")
	if os.Geteuid() != 0 {
		skip(t, "containerd needs root")
	}
	dir := shortDir(t)
	conf := filepath.Join(dir, "config.toml")
	text := "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n"
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	c := &containerd{t, ctr, filepath.Join(dir, "s")}
	process(t, func() bool { return exec.Command(ctr, "--address", c.sock, "version").Run() == nil },
		program, "--config", conf, "--root", filepath.Join(dir, "root"), "--state", filepath.Join(dir, "state"), "--address", c.sock)
	return c
}

// pull pulls with the files that tidemark setup wrote below root.
func (c *containerd) pull(root, ref string) (string, error) {
	out, err := exec.Command(c.ctr, "--address", c.sock, "images", "pull", "--snapshotter", "native", "--hosts-dir", filepath.Join(root, "etc/containerd/certs.d"), ref).CombinedOutput()
	return string(out), err
}

// containerd pulls from two registries under their own names, set up by tidemark
// setup, twice, the second time with both gone.
func TestContainerdPullsThroughTidemark(t *testing.T) {
	need(t, "containerd")
	s := newSite(t, "")
	for _, variant := range [][]string{nil, {"--no-fallback"}} {
		root := s.setUp(append([]string{"containerd"}, variant...)...)
		c := startContainerd(t)
		for i, ref := range s.images {
			if out, err := c.pull(root, ref); err != nil {
				t.Fatalf("ctr pull %s: %v\n%s", ref, err, out)
			}
			if out := command(t, nil, c.ctr, "--address", c.sock, "images", "list"); !strings.Contains(out, s.digests[i]) {
				t.Errorf("ctr has\n%s\nwant %s of %s", out, s.digests[i], ref)
			}
		}
		s.wentThrough()
		s.gone()
	}
}

// A client whose mirror is down goes to the registry itself within seconds, unless
// it was set up to go to nobody else; and doctor tells the one from the other.
func TestClientsWhoseMirrorIsDown(t *testing.T) {
	c := startContainerd(t)
	s := newSite(t, "")
	open, closed := s.setUp("containerd"), s.setUp("containerd", "--no-fallback")
	for root, want := range map[string]string{open: "containerd comes here, and goes to the registry itself", closed: "containerd comes here, and to nobody else"} {
		if out, _ := s.run("doctor", "--root", root); !strings.Contains(out, want) || !strings.Contains(out, "docker.io, ghcr.io)") {
			t.Errorf("doctor says\n%s\nwant %q of containerd", out, want)
		}
	}
	s.stop()
	began := time.Now()
	out, err := c.pull(open, s.images[1])
	if took := time.Since(began); err != nil || took > 5*time.Second {
		t.Errorf("with a way around, the pull took %v: %v\n%s", took, err, out)
	}
	began = time.Now()
	out, err = c.pull(closed, s.images[0])
	if took := time.Since(began); err == nil || took > 5*time.Second {
		t.Errorf("without one it took %v: %v\n%s\nwant it refused", took, err, out)
	}
}

// podman pulls from two registries under their own names, set up by tidemark
// setup, twice, the second time with both gone.
func TestPodmanPullsThroughTidemark(t *testing.T) {
	podman := need(t, "podman")
	if os.Geteuid() != 0 {
		skip(t, "podman without root needs more than a test can set up")
	}
	s := newSite(t, "")
	for _, variant := range [][]string{nil, {"--no-fallback"}} {
		root := s.setUp(append([]string{"podman"}, variant...)...)
		env := []string{"CONTAINERS_REGISTRIES_CONF=" + filepath.Join(root, "etc/containers/registries.conf.d/50-tidemark.conf")}
		dir := shortDir(t)
		run := func(args ...string) string {
			return command(t, env, podman, append([]string{"--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"), "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"}, args...)...)
		}
		for i, ref := range s.images {
			run("pull", ref)
			if out := run("image", "inspect", "--format", "{{.Digest}}", ref); strings.TrimSpace(out) != s.digests[i] {
				t.Errorf("podman has %s of %s, want %s", out, ref, s.digests[i])
			}
		}
		s.wentThrough()
		s.gone()
	}
}

// crane, oras and regctl reach every registry by its name as a prefix, and find
// what refers to an image.
func TestToolsReachEveryRegistryByPrefix(t *testing.T) {
	crane, oras, regctl := need(t, "crane"), need(t, "oras"), need(t, "regctl")
	s := newSite(t, ", push: pass")
	env := []string{"HOME=" + t.TempDir(), "DOCKER_CONFIG=" + t.TempDir()}
	command(t, env, regctl, "registry", "set", "--tls=disabled", s.host())
	file := filepath.Join(t.TempDir(), "sbom.json")
	if err := os.WriteFile(file, []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	for i, ref := range s.images {
		through := s.host() + "/" + ref
		for _, tool := range [][]string{
			{crane, "--insecure", "digest", through},
			{oras, "resolve", "--plain-http", through},
			{regctl, "image", "digest", through},
		} {
			if got := strings.TrimSpace(command(t, env, tool[0], tool[1:]...)); got != s.digests[i] {
				t.Errorf("%s says that %s is %s, want %s", filepath.Base(tool[0]), ref, got, s.digests[i])
			}
		}
		dir := t.TempDir()
		command(t, env, crane, "--insecure", "pull", through, filepath.Join(dir, "crane.tar"))
		command(t, env, oras, "copy", "--from-plain-http", "--to-oci-layout", through, filepath.Join(dir, "oras")+":1")
		command(t, env, regctl, "image", "copy", through, "ocidir://"+filepath.Join(dir, "regctl")+":1")

		// What is attached through tidemark is found through it, and upstream has it.
		command(t, env, oras, "attach", "--plain-http", "--artifact-type", "application/spdx+json", "--disable-path-validation", through, file)
		for _, tool := range [][]string{
			{oras, "discover", "--plain-http", "--format", "json", through},
			{regctl, "artifact", "list", through},
		} {
			if out := command(t, env, tool[0], tool[1:]...); !strings.Contains(out, "application/spdx+json") {
				t.Errorf("%s does not find what was attached to %s:\n%s", filepath.Base(tool[0]), ref, out)
			}
		}
	}
	if out := command(t, env, crane, "--insecure", "catalog", s.host()); !strings.Contains(out, "docker.io/library/app\n") || !strings.Contains(out, "ghcr.io/org/app\n") {
		t.Errorf("crane catalog says\n%s\nwant both repositories", out)
	}
	if out := command(t, env, crane, "--insecure", "ls", s.host()+"/ghcr.io/org/app"); !strings.Contains(out, "1\n") {
		t.Errorf("crane ls says\n%s", out)
	}
	s.wentThrough()
}

// A push goes through tidemark to the registry behind it, and what it made of the
// tag is on the record as a push.
func TestPushesGoThroughTidemark(t *testing.T) {
	crane, skopeo := need(t, "crane"), need(t, "skopeo")
	s := newSite(t, ", push: pass")
	img, err := random.Image(3_000_000, 2)
	if err != nil {
		t.Fatal(err)
	}
	moved := s.ghcr.push(t, "org/app:new", img)
	command(t, nil, crane, "--insecure", "copy", s.ghcr.addr+"/org/app:new", s.host()+"/docker.io/library/app:3")
	command(t, nil, skopeo, "copy", "--src-tls-verify=false", "--dest-tls-verify=false", "docker://"+s.ghcr.addr+"/org/app:new", "docker://"+s.host()+"/docker.io/library/app:2")
	for _, tag := range []string{"2", "3"} {
		n, err := name.ParseReference(s.hub.addr+"/library/app:"+tag, name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		if d, err := remote.Head(n); err != nil || d.Digest.String() != moved {
			t.Errorf("the registry has %v, %v for tag %s, want %s", d, err, tag, moved)
		}
		var list struct {
			Events []struct {
				Leaf struct {
					Evidence struct{ Trigger string }
					New      struct{ Digest string }
				}
			}
		}
		s.getJSON("/api/v1/events?ref=docker.io/library/app:"+tag, &list)
		if len(list.Events) != 1 || list.Events[0].Leaf.Evidence.Trigger != "push" || list.Events[0].Leaf.New.Digest != moved {
			t.Errorf("the ledger has %+v of tag %s, want one push of %s", list, tag, moved)
		}
	}
}

// A private registry behind tidemark stays private: who logs in there pulls, from
// the cache too; others are told what the registry tells them.
func TestPrivateRegistryStaysPrivate(t *testing.T) {
	skopeo, htpasswd := need(t, "skopeo"), need(t, "htpasswd")
	users := filepath.Join(t.TempDir(), "users")
	command(t, nil, htpasswd, "-Bbc", users, "alice", "s3cret")
	up := startRegistry(t, "auth: {htpasswd: {realm: basic, path: "+users+"}}")
	img := image(t, empty.Image, 2)
	up.login = "alice:s3cret"
	up.push(t, "library/app:1", img)

	for _, tt := range []struct{ name, config string }{
		{"passthrough", `, auth: {mode: passthrough}`},
		{"basic", `, auth: {mode: basic, htpasswd_file: ` + users + `}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			credentials := ""
			if tt.name == "basic" {
				t.Setenv("TM_TEST_PASSWORD", "s3cret")
				credentials = `, username: alice, password: "${TM_TEST_PASSWORD}"`
			}
			s := serve(t, fmt.Sprintf("data: %s\nregistry: {listen: '127.0.0.1:0'%s}\nadmin: {listen: '127.0.0.1:0'}\nupstreams:\n  docker.io: {endpoints: ['%s']%s}\n",
				filepath.Join(t.TempDir(), "data"), tt.config, up.URL, credentials))
			through := "docker://" + strings.TrimPrefix(s.registry, "http://") + "/library/app:1"
			for range 2 {
				command(t, nil, skopeo, "copy", "--src-tls-verify=false", "--src-creds", "alice:s3cret", through, "dir:"+t.TempDir())
				for _, who := range [][]string{{"--src-no-creds"}, {"--src-creds", "alice:wrong"}, {"--src-creds", "mallory:s3cret"}} {
					out, err := exec.Command(skopeo, append(append([]string{"copy", "--src-tls-verify=false"}, who...), through, "dir:"+t.TempDir())...).CombinedOutput()
					if err == nil || !strings.Contains(string(out), "authentication required") && !strings.Contains(string(out), "unauthorized") {
						t.Errorf("skopeo %v = %v\n%s\nwant it refused", who, err, out)
					}
				}
			}
			if strings.Contains(s.log.String(), "s3cret") {
				t.Error("the password is in the log")
			}
			resp, err := http.Get(s.registry + "/v2/")
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != 401 || !strings.HasPrefix(resp.Header.Get("Www-Authenticate"), "Basic ") {
				t.Errorf("GET /v2/ without credentials = %d %v, want a challenge", resp.StatusCode, resp.Header)
			}
		})
	}
}

// load puts an image into a scripted upstream.
func load(t *testing.T, up *upstreamtest.Registry, repo, tag string, img v1.Image) string {
	t.Helper()
	raw, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	mediaType, err := img.MediaType()
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	up.PushBlobs(upstreamtest.NewContent("", config))
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		rc, err := l.Compressed()
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(rc)
		if err != nil {
			t.Fatal(err)
		}
		up.PushBlobs(upstreamtest.NewContent("", body))
	}
	m := upstreamtest.NewContent(string(mediaType), raw)
	up.PushManifest(repo, tag, m)
	return m.Digest.String()
}

// A Docker daemon behind the proxy logs in to the registry itself, with a token of
// the registry's own realm, and pulls; whoever has not logged in does not get what
// is cached by then.
func TestDockerPullsWithRightsOfItsOwn(t *testing.T) {
	up := upstreamtest.New()
	t.Cleanup(up.Close)
	up.RequireToken("alice", "s3cret", time.Minute)
	digest := load(t, up, "org/app", "1", image(t, empty.Image, 2))
	addr, data := freeAddr(t), filepath.Join(t.TempDir(), "data")
	s := serve(t, fmt.Sprintf(`data: %s
registry: {listen: "127.0.0.1:0", auth: {mode: passthrough}, intercept: {listen: "%s"}}
admin: {listen: "127.0.0.1:0"}
default_upstream: ghcr.io
upstreams:
  ghcr.io: {endpoints: ["%s"]}
`, data, addr, up.URL()))
	d := startDocker(t, "{}", "HTTPS_PROXY=http://"+addr, "SSL_CERT_FILE="+filepath.Join(data, "tls", "intercept-ca.crt"))
	run := func(home string, args ...string) (string, error) {
		cmd := d.command(args...)
		cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+home)
		cmd.Stdin = strings.NewReader("s3cret")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	alice, nobody := t.TempDir(), t.TempDir()
	if out, err := run(alice, "login", "--username", "alice", "--password-stdin", "ghcr.io"); err != nil {
		t.Fatalf("docker login: %v\n%s", err, out)
	}
	for range 2 {
		if out, err := run(alice, "pull", "ghcr.io/org/app:1"); err != nil || !strings.Contains(out, digest) {
			t.Fatalf("docker pull by who has logged in: %v\n%s", err, out)
		}
		d.run("rmi", "ghcr.io/org/app:1")
		if out, err := run(nobody, "pull", "ghcr.io/org/app:1"); err == nil || !strings.Contains(out, "unauthorized") && !strings.Contains(out, "denied") {
			t.Errorf("docker pull by who has not: %v\n%s\nwant it refused", err, out)
		}
	}
	if n := up.Count("GET", "/blobs/"); n != 3 {
		t.Errorf("upstream was asked for %d blobs, want 3, each once", n)
	}
	if strings.Contains(s.log.String(), "s3cret") || strings.Contains(s.log.String(), "token-") {
		t.Error("a secret is in the log")
	}
}
