package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"tidemark/proxy/upstream/upstreamtest"
)

// Stories are in testdata, one file each. Beside testscript's own commands
// they have
//
//	upstream push REPO:TAG NAME   make a tag mean the image of the layer NAME
//	upstream close                the upstream is gone from here on
//	serve [args]                  start tidemark; -c tidemark.yaml if it is there
//	stop                          SIGTERM, and wait for the end
//	pull REF NAME                 pull a tag, which must mean the image NAME
//	tidemark args                 a client command against the server
//	exits CODE args               the same, with the exit code it must have
//
// $UPSTREAM is the upstream's address, $NAME the digest of the image NAME.
func TestStories(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			up := upstreamtest.New()
			env.Defer(up.Close)
			env.Setenv("UPSTREAM", up.URL().String())
			env.Values["upstream"] = up
			env.Values["server"] = &running{t: t}
			env.Setenv("PATH", filepath.Dir(binary)+string(os.PathListSeparator)+env.Getenv("PATH"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"upstream": upstreamCommand,
			"serve":    serveCommand,
			"stop":     func(ts *testscript.TestScript, _ bool, _ []string) { ts.Value("server").(*running).stop() },
			"pull":     pullCommand,
			"tidemark": func(ts *testscript.TestScript, neg bool, args []string) {
				if err := ts.Exec(binary, args...); (err != nil) != neg {
					ts.Fatalf("tidemark %s: %v", strings.Join(args, " "), err)
				}
			},
			"exits": exitsCommand,
		},
	})
}

func upstreamCommand(ts *testscript.TestScript, _ bool, args []string) {
	up := ts.Value("upstream").(*upstreamtest.Registry)
	switch {
	case len(args) == 3 && args[0] == "push":
		repo, tag, _ := strings.Cut(args[1], ":")
		img := upstreamtest.NewImage(args[2])
		up.Push(repo, tag, img)
		ts.Setenv(args[2], img.Manifest.Digest.String())
	case len(args) == 1 && args[0] == "close":
		up.Close()
	default:
		ts.Fatalf("usage: upstream push REPO:TAG NAME, or upstream close")
	}
}

func serveCommand(ts *testscript.TestScript, _ bool, args []string) {
	conf := fmt.Sprintf("data: %s\nregistry: {listen: '127.0.0.1:0'}\nadmin: {listen: '127.0.0.1:0'}\ntags: {ttl: 0s}\nupstreams:\n  docker.io: {endpoints: ['%s']}\n",
		ts.MkAbs("data"), ts.Getenv("UPSTREAM"))
	r := ts.Value("server").(*running)
	r.server = serve(r.t, conf, args...)
	ts.Setenv("TIDEMARK_SERVER", r.admin)
	ts.Setenv("REGISTRY", r.registry)
}

// running is the server of a story, if it has started one.
type running struct {
	t *testing.T
	*server
}

// exitsCommand runs tidemark and wants an exit code.
func exitsCommand(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: exits CODE args")
	}
	code := "0"
	if err := ts.Exec(binary, args[1:]...); err != nil {
		code = strings.TrimPrefix(err.Error(), "exit status ")
	}
	if code != args[0] {
		ts.Fatalf("tidemark %s: exit %s, want %s", strings.Join(args[1:], " "), code, args[0])
	}
}

func pullCommand(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: pull REF NAME")
	}
	repo, tag, _ := strings.Cut(args[0], ":")
	resp, err := http.Get(ts.Getenv("REGISTRY") + "/v2/" + repo + "/manifests/" + tag)
	ts.Check(err)
	resp.Body.Close()
	got := resp.Header.Get("Docker-Content-Digest")
	if ok := resp.StatusCode == 200 && got == ts.Getenv(args[1]); ok == neg {
		ts.Fatalf("pull %s = %s %s, want %s", args[0], resp.Status, got, ts.Getenv(args[1]))
	}
}
