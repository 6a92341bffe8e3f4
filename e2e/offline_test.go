package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"tidemark/proxy/admin"
)

// An island is a network namespace with nothing but its own loopback: no route leads
// anywhere.
type island struct {
	t    *testing.T
	name string
	in   []string // runs a program in it
}

func newIsland(t *testing.T) *island {
	t.Helper()
	ip := need(t, "ip")
	if os.Geteuid() != 0 {
		skip(t, "a network namespace needs root")
	}
	n := &island{t: t, name: fmt.Sprintf("tidemark-%d", os.Getpid())}
	n.in = []string{need(t, "nsenter"), "--net=/var/run/netns/" + n.name} // ip netns exec would hide the cgroups
	if out, err := exec.Command(ip, "netns", "add", n.name).CombinedOutput(); err != nil {
		skip(t, "no network namespace: "+string(out))
	}
	t.Cleanup(func() { command(t, nil, ip, "netns", "del", n.name) })
	command(t, nil, n.in[0], append(n.in[1:], ip, "link", "set", "lo", "up")...)
	if out := command(t, nil, n.in[0], append(n.in[1:], ip, "route", "show", "table", "all", "type", "unicast")...); strings.TrimSpace(out) != "" {
		t.Fatalf("the island has a route:\n%s", out)
	}
	return n
}

// get is a GET by somebody on the island.
func (n *island) get(address string) (*http.Response, []byte) {
	n.t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: n.dial}}
	resp, err := client.Get(address)
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	return resp, body
}

// dial opens a connection on the island: sockets belong to the namespace that the
// thread is in which makes them.
func (n *island) dial(_ context.Context, network, address string) (net.Conn, error) {
	type dialed struct {
		conn net.Conn
		err  error
	}
	done := make(chan dialed)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		f, err := os.Open("/var/run/netns/" + n.name)
		if err == nil {
			defer f.Close()
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
		}
		var conn net.Conn
		if err == nil {
			conn, err = net.Dial(network, address)
		}
		done <- dialed{conn, err}
	}()
	d := <-done
	return d.conn, d.err
}

// platforms is an index of images of several platforms on a common base.
func platforms(t *testing.T, base v1.Image, names ...string) v1.ImageIndex {
	t.Helper()
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, n := range names {
		p, err := v1.ParsePlatform(n)
		if err != nil {
			t.Fatal(err)
		}
		img := image(t, base, 1)
		config, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		config.OS, config.Architecture, config.Variant = p.OS, p.Architecture, p.Variant
		if img, err = mutate.ConfigFile(img, config); err != nil {
			t.Fatal(err)
		}
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: p}})
	}
	return idx
}

// pushIndex makes ref mean an index in the registry, and returns its digest.
func (r *realRegistry) pushIndex(t *testing.T, ref string, idx v1.ImageIndex) string {
	t.Helper()
	n, err := name.ParseReference(r.addr+"/"+ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(n, idx); err != nil {
		t.Fatal(err)
	}
	d, err := idx.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// refer pushes a manifest about an image, and returns its digest.
func (r *realRegistry) refer(t *testing.T, repository, subject string) string {
	t.Helper()
	n, err := name.NewDigest(r.addr+"/"+repository+"@"+subject, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	about, err := remote.Head(n)
	if err != nil {
		t.Fatal(err)
	}
	img, err := random.Image(100, 1)
	if err != nil {
		t.Fatal(err)
	}
	img = mutate.ConfigMediaType(mutate.MediaType(img, types.OCIManifestSchema1), "application/vnd.example.signature")
	signature, ok := mutate.Subject(img, *about).(v1.Image)
	if !ok {
		t.Fatal("no image")
	}
	d, err := signature.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(n.Context().Digest(d.String()), signature); err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// Ten images, some for several platforms, on common layers and one with what refers to
// it, are carried to a place without any network. There a Docker daemon and a podman
// pull all of them; then two tags have moved, a delta is carried over, and the next
// pulls get the new ones. A third machine can tell that both bundles are what they
// should be.
func TestTenImagesAreCarriedToAPlaceWithoutNetwork(t *testing.T) {
	podman := need(t, "podman")
	island := newIsland(t)
	up := startRegistry(t)
	dir := t.TempDir()
	from := serve(t, config(filepath.Join(dir, "from"), up.URL))

	base := image(t, empty.Image, 3)
	digests, list := make(map[string]string), ""
	for i := range 10 {
		repo := fmt.Sprintf("library/app%d", i)
		if i < 4 {
			digests[repo] = up.pushIndex(t, repo+":1", platforms(t, base, "linux/amd64", "linux/arm64"))
		} else {
			digests[repo] = up.push(t, repo+":1", image(t, base, 1))
		}
		list += fmt.Sprintf("app%d:1\n", i)
	}
	signature := up.refer(t, "library/app9", digests["library/app9"])
	images := filepath.Join(dir, "images.txt")
	if err := os.WriteFile(images, []byte(list), 0o644); err != nil {
		t.Fatal(err)
	}
	monday, tuesday := filepath.Join(dir, "monday.tar"), filepath.Join(dir, "tuesday.tar")
	if out, code := from.run("export", "-o", monday, "-f", images); code != 1 {
		t.Fatalf("an export of what was never seen: %d\n%s", code, out)
	}
	must(t, from, "warm", "-f", images)
	must(t, from, "export", "-o", monday, "-f", images)
	vkey := filepath.Join(dir, "log.vkey")
	copyFile(t, filepath.Join(dir, "from", "log.vkey"), vkey)

	data := filepath.Join(dir, "to")
	to := serveIn(t, island.in, config(data, "https://registry.invalid"), "--offline")
	if _, code := to.run("import", monday); code != 1 {
		t.Fatalf("a bundle of an unknown key was imported: %d", code)
	}
	must(t, to, "import", monday, "--trust", vkey)
	if out := must(t, to, "import", monday); !strings.Contains(out, "imported already") {
		t.Errorf("the same bundle again:\n%s", out)
	}
	if out := must(t, to, "cache", "ls", "--incomplete", "--verify", "--json"); strings.Contains(out, "app") {
		t.Errorf("not complete after the import:\n%s", out)
	}

	out, _ := to.run("setup", "docker", "--registry", to.registry)
	d := startDockerIn(t, island.in, out[strings.Index(out, "{"):strings.Index(out, "}")+1])
	pull := func() {
		t.Helper()
		for repo, want := range digests {
			ref := strings.TrimPrefix(repo, "library/") + ":1"
			if out := d.run("pull", ref); !strings.Contains(out, want) {
				t.Errorf("docker pull %s on the island got another image than %s:\n%s", ref, want, out)
			}
		}
		root, stores := t.TempDir(), shortDir(t)
		if out, code := to.run("setup", "podman", "--no-fallback", "-c", to.config, "--registry", to.registry, "--write", "--root", root); code != 0 {
			t.Fatalf("setup podman: %s", out)
		}
		env := []string{"CONTAINERS_REGISTRIES_CONF=" + filepath.Join(root, "etc/containers/registries.conf.d/50-tidemark.conf")}
		run := func(args ...string) string {
			return command(t, env, island.in[0], append(append(island.in[1:], podman, "--root", filepath.Join(stores, "root"), "--runroot", filepath.Join(stores, "run"), "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"), args...)...)
		}
		for repo, want := range digests {
			ref := "docker.io/" + repo + ":1"
			run("pull", ref)
			if out := run("image", "inspect", "--format", "{{json .RepoDigests}}", ref); !strings.Contains(out, want) {
				t.Errorf("podman on the island has %s of %s, want %s", out, ref, want)
			}
		}
	}
	pull()
	resp, body := island.get(to.registry + "/v2/library/app9/referrers/" + digests["library/app9"])
	if resp.StatusCode != 200 || !strings.Contains(string(body), signature) {
		t.Errorf("what refers to app9: %s %s, want %s", resp.Status, body, signature)
	}
	if resp, body := island.get(to.registry + "/v2/library/app9/manifests/" + signature); resp.StatusCode != 200 {
		t.Errorf("the signature: %s %s", resp.Status, body)
	}
	if resp, body := island.get(to.registry + "/v2/library/other/manifests/1"); resp.StatusCode != 404 || !strings.Contains(string(body), "MANIFEST_UNKNOWN") || !strings.Contains(string(body), "offline") {
		t.Errorf("what is not here: %s %s", resp.Status, body)
	}

	old := digests["library/app0"]
	digests["library/app0"] = up.pushIndex(t, "library/app0:1", platforms(t, base, "linux/amd64", "linux/arm64"))
	digests["library/app5"] = up.push(t, "library/app5:1", image(t, base, 1))
	must(t, from, "warm", "-f", images)
	must(t, from, "export", "-o", tuesday, "--since", monday, "-f", images)
	full, delta := sizeOf(t, monday), sizeOf(t, tuesday)
	if delta >= full/2 {
		t.Errorf("the delta has %d bytes, the whole %d", delta, full)
	}
	if out := must(t, to, "import", tuesday); strings.Count(out, "moved  ") != 2 || strings.Count(out, "same   ") != 8 {
		t.Errorf("the delta was imported as\n%s\nwant two moved and the others the same", out)
	}
	pull()
	var history admin.History
	if _, body := island.get(to.admin + "/api/v1/tags/history?ref=docker.io/library/app0:1"); json.Unmarshal(body, &history) != nil || len(history.History) != 4 {
		t.Errorf("history of app0: %s", body)
	}
	for _, st := range history.History {
		if st.Basis != "imported" {
			t.Errorf("%s is %s, want it to be imported", st.Digest, st.Basis)
		}
	}
	ended := history.History[3].Ended // there, before anything was known here
	asof := strings.ToLower(ended.Add(-time.Second).UTC().Format("2006-01-02T15-04-05Z"))
	if resp, body := island.get(to.registry + "/v2/asof/" + asof + "/library/app0/manifests/1"); resp.Header.Get("Docker-Content-Digest") != old || resp.Header.Get("Tidemark-Basis") != "imported" {
		t.Errorf("as of a second before it moved there: %s %v %s, want %s", resp.Status, resp.Header, body, old)
	}

	third := t.TempDir()
	for _, b := range []string{monday, tuesday} {
		copyFile(t, b, filepath.Join(third, "bundle.tar"))
		copyFile(t, vkey, filepath.Join(third, "log.vkey"))
		cmd := exec.Command(binary, "verify", "--bundle", "bundle.tar", "--vkey", "log.vkey")
		cmd.Dir, cmd.Env = third, []string{"PATH=/nowhere"}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "complete and consistent") {
			t.Errorf("verify --bundle of %s: %v\n%s", filepath.Base(b), err, out)
		}
	}
	to.stop()
	sound(t, data)
}

// must runs a client command that succeeds.
func must(t *testing.T, s *server, args ...string) string {
	t.Helper()
	out, code := s.run(args...)
	if code != 0 {
		t.Fatalf("tidemark %s: exit %d\n%s", strings.Join(args, " "), code, out)
	}
	return out
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func sizeOf(t *testing.T, file string) int64 {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// Who has no tidemark reads a bundle, too: containerd, which is what Docker loads images
// by, and skopeo; whole images, and those of one platform.
func TestOthersReadABundle(t *testing.T) {
	c := startContainerd(t)
	skopeo := need(t, "skopeo")
	up := startRegistry(t)
	dir := t.TempDir()
	s := serve(t, config(filepath.Join(dir, "data"), up.URL))
	native := "linux/" + runtime.GOARCH
	multi := up.pushIndex(t, "library/multi:1", platforms(t, empty.Image, native, "linux/s390x"))
	docker := up.push(t, "library/app:1", image(t, empty.Image, 2)) // of Docker's media types
	for name, args := range map[string][]string{"whole": nil, "native": {"--platform", native}} {
		file := filepath.Join(dir, name+".tar")
		must(t, s, append([]string{"warm", "multi:1", "app:1"}, args...)...)
		must(t, s, append([]string{"export", "-o", file, "multi:1", "app:1"}, args...)...)
		command(t, nil, c.ctr, "--address", c.sock, "images", "import", "--snapshotter", "native", file)
		list := command(t, nil, c.ctr, "--address", c.sock, "images", "list")
		for ref, digest := range map[string]string{"docker.io/library/multi:1": multi, "docker.io/library/app:1": docker} {
			if !strings.Contains(list, ref) || !strings.Contains(list, digest) {
				t.Errorf("%s: containerd has\n%s\nwant %s of %s", name, list, digest, ref)
			}
		}
		archive := "oci-archive:" + file + ":docker.io/library/multi:1"
		command(t, nil, skopeo, "copy", archive, "dir:"+t.TempDir())
		if raw := command(t, nil, skopeo, "inspect", "--raw", archive); digestOf([]byte(raw)) != multi {
			t.Errorf("%s: skopeo has %s, want %s", name, raw, multi)
		}
		command(t, nil, c.ctr, "--address", c.sock, "images", "remove", "docker.io/library/multi:1", "docker.io/library/app:1")
	}
}
