package e2e

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// A process is a program of somebody else that runs for a story.
func process(t *testing.T, ready func() bool, path string, args ...string) {
	t.Helper()
	processWith(t, nil, ready, path, args...)
}

// processWith is process with variables of the environment. It may be stopped
// before the story ends.
func processWith(t *testing.T, env []string, ready func() bool, path string, args ...string) (stop func()) {
	t.Helper()
	log := &lockedBuffer{}
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	stop = func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			_ = cmd.Process.Kill()
			<-done
		}
	}
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			t.Logf("%s said:\n%s", path, log)
		}
	})
	for deadline := time.Now().Add(30 * time.Second); !ready(); time.Sleep(50 * time.Millisecond) {
		select {
		case <-done:
			t.Fatalf("%s ended at once:\n%s", path, log)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is not ready after 30 s:\n%s", path, log)
		}
	}
	return stop
}

// A realRegistry is distribution, behind a proxy that counts and can be closed.
type realRegistry struct {
	addr  string // where to push
	login string // user:password for that, "" without
	*httptest.Server
	mu    sync.Mutex
	asked []string // method and path
}

// startRegistry starts distribution, v3 or Debian's, on a folder of its own, with
// more lines in its configuration.
func startRegistry(t *testing.T, more ...string) *realRegistry {
	t.Helper()
	program := need(t, "registry", "docker-registry")
	r := &realRegistry{addr: freeAddr(t)}
	dir := t.TempDir()
	conf := filepath.Join(dir, "config.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}, delete: {enabled: true}}\nhttp: {addr: %s}\n%s\n", dir, r.addr, strings.Join(more, "\n"))
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	process(t, func() bool {
		resp, err := http.Get("http://" + r.addr + "/v2/")
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	}, program, "serve", conf)
	r.open()
	t.Cleanup(func() { r.Server.Close() })
	return r
}

// open puts the counting proxy in front, on a port of its own.
func (r *realRegistry) open() {
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: r.addr})
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		r.mu.Lock()
		r.asked = append(r.asked, q.Method+" "+q.URL.Path)
		r.mu.Unlock()
		proxy.ServeHTTP(w, q)
	}))
}

// count counts the requests since the last reset that contain part.
func (r *realRegistry) count(part string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, a := range r.asked {
		if strings.Contains(a, part) {
			n++
		}
	}
	return n
}

func (r *realRegistry) reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked = nil
}

func freeAddr(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(nil)
	defer s.Close()
	return s.Listener.Addr().String()
}

// image is an image of layers of random bytes, with a base's layers below.
func image(t *testing.T, base v1.Image, layers int) v1.Image {
	t.Helper()
	img, err := random.Image(200_000, int64(layers))
	if err != nil {
		t.Fatal(err)
	}
	own, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.AppendLayers(base, own...); err != nil {
		t.Fatal(err)
	}
	return img
}

// push makes ref mean img in the registry, and returns its digest.
func (r *realRegistry) push(t *testing.T, ref string, img v1.Image) string {
	t.Helper()
	n, err := name.ParseReference(r.addr+"/"+ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	auth := authn.Anonymous
	if user, password, ok := strings.Cut(r.login, ":"); ok {
		auth = &authn.Basic{Username: user, Password: password}
	}
	if err := remote.Write(n, img, remote.WithAuth(auth)); err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// shortDir is a folder with a short name: the path of a socket has 108 bytes.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// A docker is a Docker daemon of the story's own.
type docker struct {
	t    *testing.T
	sock string
}

// startDocker starts a daemon whose daemon.json has what tidemark setup prints.
func startDocker(t *testing.T, daemonJSON string, env ...string) *docker {
	t.Helper()
	return startDockerIn(t, nil, daemonJSON, env...)
}

// startDockerIn starts it by another program, which has a network of its own.
func startDockerIn(t *testing.T, in []string, daemonJSON string, env ...string) *docker {
	t.Helper()
	dockerd := need(t, "dockerd")
	need(t, "docker")
	if os.Geteuid() != 0 {
		skip(t, "a Docker daemon needs root")
	}
	dir := shortDir(t)
	conf := filepath.Join(dir, "daemon.json")
	if err := os.WriteFile(conf, []byte(daemonJSON), 0o644); err != nil {
		t.Fatal(err)
	}
	d := &docker{t, filepath.Join(dir, "d.sock")}
	line := slices.Concat(in, []string{dockerd, "--config-file", conf, "--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"),
		"--pidfile", filepath.Join(dir, "pid"), "--host", "unix://" + d.sock, "--iptables=false", "--ip6tables=false", "--bridge=none"})
	processWith(t, env, func() bool { return d.command("version").Run() == nil }, line[0], line[1:]...)
	return d
}

func (d *docker) command(args ...string) *exec.Cmd {
	return exec.Command("docker", append([]string{"--host", "unix://" + d.sock}, args...)...)
}

func (d *docker) run(args ...string) string {
	d.t.Helper()
	out, err := d.command(args...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// pull pulls app:1 afresh and wants it to be the image of a digest.
func (d *docker) pull(digest string) {
	d.t.Helper()
	if out := d.run("pull", "app:1"); !strings.Contains(out, digest) {
		d.t.Errorf("docker pull got another image than %s:\n%s", digest, out)
	}
}

// A Docker daemon pulls through tidemark; again, without one blob request
// upstream; again, with upstream gone; and after the tag has moved it gets the
// new image, and the move is on the record and can be proven.
func TestDockerPullsThroughTidemark(t *testing.T) {
	up := startRegistry(t)
	data := filepath.Join(t.TempDir(), "data")
	s := serve(t, config(data, up.URL))
	out, _ := s.run("setup", "docker", "--registry", s.registry)
	line := out[strings.Index(out, "{") : strings.Index(out, "}")+1]
	d := startDocker(t, line)

	base := image(t, empty.Image, 3)
	old := up.push(t, "library/app:1", image(t, base, 2))
	d.pull(old)
	if n := up.count("GET /v2/library/app/blobs/"); n != 6 {
		t.Errorf("the first pull made %d blob requests upstream, want one for each of 5 layers and the config", n)
	}
	d.run("rmi", "app:1")
	up.reset()
	d.pull(old)
	if n := up.count("/blobs/"); n != 0 {
		t.Errorf("the second pull made %d blob requests upstream, want none", n)
	}

	up.Server.Close()
	d.run("rmi", "app:1")
	d.pull(old)

	up.open() // at another address: as a registry that comes back behind another name
	s.stop()
	s = serve(t, strings.Replace(config(data, up.URL), `"127.0.0.1:0"`, `"`+strings.TrimPrefix(s.registry, "http://")+`"`, 1))
	moved := up.push(t, "library/app:1", image(t, base, 1))
	d.pull(moved)
	if n := up.count("GET /v2/library/app/blobs/"); n != 2 {
		t.Errorf("the pull after the move made %d blob requests upstream, want only the new layer and config", n)
	}

	log, _ := s.run("log", "app:1")
	for _, want := range []string{"event 1  tag.moved  docker.io/library/app:1", "old      " + old, "new      " + moved, "between  20"} {
		if !strings.Contains(log, want) {
			t.Errorf("tidemark log does not say %q:\n%s", want, log)
		}
	}
	s.verified(2)
	sound(t, data)
}

// skopeo copies an image with all its platforms through tidemark, twice, the
// second time with upstream gone, and gets the same bytes as directly.
func TestSkopeoCopiesThroughTidemark(t *testing.T) {
	skopeo := need(t, "skopeo")
	up := startRegistry(t)
	idx, err := random.Index(100_000, 3, 3)
	if err != nil {
		t.Fatal(err)
	}
	n, err := name.ParseReference(up.addr+"/library/multi:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(n, idx); err != nil {
		t.Fatal(err)
	}
	s := serve(t, config(filepath.Join(t.TempDir(), "data"), up.URL))
	copied := func(from string) string {
		t.Helper()
		dir := t.TempDir()
		cmd := exec.Command(skopeo, "copy", "--all", "--preserve-digests", "--src-tls-verify=false", "docker://"+from, "dir:"+dir)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
		var list strings.Builder
		files, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			info, err := f.Info()
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintln(&list, f.Name(), info.Size()) // names are digests, which skopeo has checked
		}
		manifest, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
		if err != nil {
			t.Fatal(err)
		}
		return list.String() + string(manifest)
	}
	want := copied(up.addr + "/library/multi:1")
	through := strings.TrimPrefix(s.registry, "http://") + "/docker.io/library/multi:1"
	if got := copied(through); got != want {
		t.Errorf("through tidemark it is\n%s\ndirectly\n%s", got, want)
	}
	up.Server.Close()
	if got := copied(through); got != want {
		t.Errorf("without upstream it is\n%s\ndirectly\n%s", got, want)
	}
}
