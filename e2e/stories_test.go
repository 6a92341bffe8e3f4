package e2e

import (
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	_ "modernc.org/sqlite" // driver "sqlite"

	"tidemark/proxy/upstream/upstreamtest"
)

// Stories are in testdata, one file each. Beside testscript's own commands
// they have
//
//	upstream push REPO:TAG NAME   make a tag mean the image of the layer NAME, or with a
//	                              number behind it of one that has so many KiB
//	upstream delete REPO:TAG NAME forget a tag, and the image NAME
//	upstream close                the upstream is gone from here on
//	serve [args]                  start tidemark, with audit.yaml added to its configuration, $WORK in it the story's folder
//	reload                        have it read audit.yaml again (SIGHUP)
//	stop                          SIGTERM, and wait for the end
//	pull REF NAME                 pull a tag, which must mean the image NAME
//	await REF NAME                pull a tag until it means the image NAME
//	tamper INDEX                  change a byte of an entry in the stopped server's database
//	tamper served                 change what every tag serves in its tables
//	warned TEXT                   wait until /readyz has a warning with this text
//	admin PATH FILE               GET a path of the admin address into a file
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
			"await":    awaitCommand,
			"reload":   reloadCommand,
			"tamper":   tamperCommand,
			"warned":   warnedCommand,
			"admin":    adminCommand,
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
	case (len(args) == 3 || len(args) == 4) && args[0] == "push":
		repo, tag, _ := strings.Cut(args[1], ":")
		layer := args[2]
		if len(args) == 4 {
			kib, err := strconv.Atoi(args[3])
			ts.Check(err)
			layer += strings.Repeat(".", kib<<10)
		}
		img := upstreamtest.NewImage(layer)
		up.Push(repo, tag, img)
		ts.Setenv(args[2], img.Manifest.Digest.String())
	case len(args) == 3 && args[0] == "delete":
		repo, tag, _ := strings.Cut(args[1], ":")
		up.Delete(repo, tag)
		up.Delete(repo, ts.Getenv(args[2]))
	case len(args) == 1 && args[0] == "close":
		up.Close()
	default:
		ts.Fatalf("usage: upstream push REPO:TAG NAME [KIB], upstream delete REPO:TAG NAME, or upstream close")
	}
}

func adminCommand(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: admin PATH FILE")
	}
	resp, err := http.Get(ts.Value("server").(*running).admin + args[0])
	ts.Check(err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	ts.Check(err)
	if resp.StatusCode != http.StatusOK {
		ts.Fatalf("%s: %s %s", args[0], resp.Status, body)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), body, 0o644))
}

func serveCommand(ts *testscript.TestScript, _ bool, args []string) {
	r := ts.Value("server").(*running)
	r.server = serve(r.t, storyConfig(ts), args...)
	ts.Setenv("TIDEMARK_SERVER", r.admin)
	ts.Setenv("REGISTRY", r.registry)
}

func storyConfig(ts *testscript.TestScript) string {
	conf := fmt.Sprintf("data: %s\nregistry: {listen: '127.0.0.1:0'}\nadmin: {listen: '127.0.0.1:0'}\ntags: {ttl: 0s}\nupstreams:\n  docker.io: {endpoints: ['%s']}\n",
		ts.MkAbs("data"), ts.Getenv("UPSTREAM"))
	more, err := os.ReadFile(ts.MkAbs("audit.yaml"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		ts.Fatalf("%v", err)
	}
	return conf + strings.ReplaceAll(string(more), "$WORK", ts.MkAbs("."))
}

// reloadCommand sends SIGHUP and waits for the server to say what came of it.
func reloadCommand(ts *testscript.TestScript, neg bool, _ []string) {
	r := ts.Value("server").(*running)
	ts.Check(os.WriteFile(r.config, []byte(storyConfig(ts)), 0o644))
	yes, no := "the policy was reloaded", "the configuration was not reloaded"
	before := strings.Count(r.log.String(), yes) + strings.Count(r.log.String(), no)
	ts.Check(r.cmd.Process.Signal(syscall.SIGHUP))
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		log := r.log.String()
		if strings.Count(log, yes)+strings.Count(log, no) > before {
			if refused := strings.LastIndex(log, no) > strings.LastIndex(log, yes); refused != neg {
				ts.Fatalf("reload: refused %t\n%s", refused, log)
			}
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("reload: nothing happened\n%s", log)
		}
	}
}

// tamperCommand changes the last byte before the end of an entry.
func tamperCommand(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: tamper INDEX|served")
	}
	db, err := sql.Open("sqlite", ts.MkAbs("data/audit.db"))
	ts.Check(err)
	defer db.Close()
	var res sql.Result
	if args[0] == "served" {
		res, err = db.Exec("UPDATE tag_state SET served_digest = 'sha256:' || substr(served_digest, 9) || '0'")
	} else {
		_, err = db.Exec("DROP TRIGGER log_leaf_update")
		ts.Check(err)
		res, err = db.Exec("UPDATE log_leaf SET body = CAST(replace(body, 'library/app', 'library/apq') AS BLOB) WHERE idx = ?", args[0])
	}
	ts.Check(err)
	if n, err := res.RowsAffected(); err != nil || n != 1 {
		ts.Fatalf("tamper: %d entries changed, %v", n, err)
	}
}

// warnedCommand waits until the server warns of something.
func warnedCommand(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: warned TEXT")
	}
	last := ""
	for began := time.Now(); time.Since(began) < 10*time.Second; time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get(ts.Getenv("TIDEMARK_SERVER") + "/readyz")
		ts.Check(err)
		body, err := io.ReadAll(resp.Body)
		ts.Check(errors.Join(err, resp.Body.Close()))
		if last = string(body); strings.Contains(last, args[0]) {
			return
		}
	}
	ts.Fatalf("the server does not warn of %q: %s", args[0], last)
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
	status, got := pulled(ts, args[0])
	if ok := status == 200 && got == ts.Getenv(args[1]); ok == neg {
		ts.Fatalf("pull %s = %d %s, want %s", args[0], status, got, ts.Getenv(args[1]))
	}
}

// pulled pulls a tag and returns what it means.
func pulled(ts *testscript.TestScript, ref string) (status int, digest string) {
	repo, tag, _ := strings.Cut(ref, ":")
	resp, err := http.Get(ts.Getenv("REGISTRY") + "/v2/" + repo + "/manifests/" + tag)
	ts.Check(err)
	resp.Body.Close()
	return resp.StatusCode, resp.Header.Get("Docker-Content-Digest")
}

func awaitCommand(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: await REF NAME")
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		status, got := pulled(ts, args[0])
		if status == 200 && got == ts.Getenv(args[1]) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("await %s: still %d %s, want %s", args[0], status, got, ts.Getenv(args[1]))
		}
	}
}
