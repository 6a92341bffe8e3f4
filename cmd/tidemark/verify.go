package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/torchwood"
	"github.com/spf13/cobra"
	"golang.org/x/mod/sumdb/note"

	"tidemark/audit"
	"tidemark/audit/sqlite"
	"tidemark/audit/taglog"
	"tidemark/proxy/admin"
)

func newVerify() *cobra.Command {
	var vkeyFile, sinceFile, saveFile, dataDir, bundleFile string
	c := &cobra.Command{
		Use:   "verify",
		Short: "Re-check the whole ledger: signature, tree, and the chain of every tag",
		Long: `Re-check the whole ledger of a server, or of a data folder: the signature of its
checkpoint, every entry against the signed tree, and for every tag that each event
begins where the one before ended. Exit code 3 if anything is off. With --bundle a
bundle is checked instead, on any machine: every byte of it, that nothing is missing,
the chain of every tag, the proofs and the signature.

Without --vkey the server is asked for its verifier, which proves that the log
is consistent, but not that it is the log you know: keep log.vkey, and the
checkpoints that --save writes, somewhere else.`,
		Example: `  tidemark verify
  tidemark verify --vkey log.vkey --since last.checkpoint --save last.checkpoint
  tidemark verify --data /var/lib/tidemark
  tidemark verify --bundle monday.tar --vkey log.vkey`,
		Args: cobra.NoArgs,
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().StringVar(&dataDir, "data", "", "data folder to check instead of a server; it may be in use")
	c.Flags().StringVar(&bundleFile, "bundle", "", "bundle to check instead of a server")
	c.Flags().StringVar(&vkeyFile, "vkey", "", "file with the log's verifier (log.vkey)")
	c.Flags().StringVar(&sinceFile, "since", "", "checkpoint saved earlier, which the log must contain")
	c.Flags().StringVar(&saveFile, "save", "", "file to save the checkpoint to if all is well")
	c.RunE = func(c *cobra.Command, _ []string) error {
		ctx := c.Context()
		if bundleFile != "" {
			if c.Flags().Changed("server") || dataDir != "" || sinceFile != "" || saveFile != "" {
				return usage(errors.New("--bundle goes with --vkey and --json only"))
			}
			return verifyBundle(c, bundleFile, vkeyFile, *asJSON)
		}
		var since []byte
		if sinceFile != "" {
			var err error
			if since, err = os.ReadFile(sinceFile); err != nil {
				return usage(err)
			}
			if _, err := taglog.Parse(since); err != nil {
				return usage(fmt.Errorf("--since %s: %w", sinceFile, err))
			}
		}
		var v *verification
		var err error
		if dataDir != "" {
			if c.Flags().Changed("server") {
				return usage(errors.New("--data and --server exclude each other"))
			}
			v, err = dataVerification(ctx, dataDir, vkeyFile)
		} else {
			v, err = cl.verification(c, vkeyFile, since != nil)
		}
		if err != nil {
			return err
		}
		defer v.close()
		report, err := audit.Verify(ctx, v.tiles, v.checkpoint, since, v.verifier)
		if err != nil {
			return err
		}
		if v.lost != "" {
			report.Problems = append([]audit.Problem{{Index: -1, What: v.lost}}, report.Problems...)
		}
		if v.tags != nil {
			if err := report.CheckTags(v.tags); err != nil {
				return err
			}
		}
		if *asJSON {
			if err := printJSON(c, report); err != nil {
				return err
			}
		} else {
			printReport(c, report)
			if v.unsigned > 0 {
				fmt.Fprintf(c.OutOrStdout(), "  %d newer events are not signed yet and were not checked\n", v.unsigned)
			}
		}
		if n := len(report.Problems); n > 0 {
			return &exitError{exitWrong, fmt.Errorf("the ledger is not what it should be: %d problems", n)}
		}
		if saveFile != "" {
			return audit.WriteFile(saveFile, v.checkpoint, 0o644)
		}
		return nil
	}
	return c
}

// A verification is what is checked, and by which verifier.
type verification struct {
	tiles      torchwood.TileReader
	checkpoint []byte
	verifier   note.Verifier
	unsigned   int64                       // entries beyond the checkpoint
	lost       string                      // what was signed and is not in the log, or ""
	tags       iter.Seq2[audit.Tag, error] // the table of tags, nil if it cannot be seen
	close      func()
}

// verification is of a running server. That nothing is signed is wrong if there
// is something to sign, or there was.
func (cl *client) verification(c *cobra.Command, vkeyFile string, signedBefore bool) (*verification, error) {
	ctx := c.Context()
	verifier, err := cl.verifier(c, vkeyFile)
	if err != nil {
		return nil, err
	}
	unsigned, err := cl.awaitSigned(ctx)
	if err != nil {
		return nil, err
	}
	checkpoint, err := cl.get(ctx, "/log/checkpoint", nil)
	if refusal := new(refusedError); errors.As(err, &refusal) && refusal.code == "not_signed" && (unsigned > 0 || signedBefore) {
		return nil, &exitError{exitWrong, err}
	}
	if err != nil {
		return nil, err
	}
	tiles, err := torchwood.NewTileFetcher(strings.TrimSuffix(cl.server, "/")+"/log", torchwood.WithUserAgent("tidemark/"+version()))
	if err != nil {
		return nil, usage(err)
	}
	return &verification{tiles: tiles, checkpoint: checkpoint, verifier: verifier, unsigned: unsigned, close: func() {}}, nil
}

// dataVerification is of a data folder. What it contains must be what the anchor
// says: the newest that was signed, kept outside of the database.
func dataVerification(ctx context.Context, dir, vkeyFile string) (*verification, error) {
	if vkeyFile == "" {
		vkeyFile = filepath.Join(dir, "log.vkey")
	}
	vkey, err := os.ReadFile(vkeyFile)
	if err != nil {
		return nil, usage(err)
	}
	verifier, err := parseVerifier(vkey)
	if err != nil {
		return nil, err
	}
	checkpoint, err := os.ReadFile(filepath.Join(dir, "anchor"))
	if err != nil {
		return nil, fmt.Errorf("nothing was signed in this folder yet: %w", err)
	}
	store, err := sqlite.OpenReadOnly(ctx, filepath.Join(dir, "audit.db"))
	if err != nil {
		return nil, err
	}
	v := &verification{
		tiles: audit.Tiles{Hashes: store, Leaves: store}, checkpoint: checkpoint, verifier: verifier,
		tags: store.EachTag(ctx, audit.TagQuery{}), close: func() { _ = store.Close() }, // it was only read
	}
	tree, err := store.Tree(ctx)
	if err != nil {
		v.close()
		return nil, err
	}
	if c, err := taglog.Open(checkpoint, verifier); err == nil {
		v.unsigned = max(0, tree.N-c.N)
		if err := audit.Contains(store, tree.N, c.Tree); errors.Is(err, audit.ErrRollback) {
			v.lost = err.Error()
		}
	}
	return v, nil
}

// signWait is how long a verification waits for the last events to be signed,
// which takes a server that is well about a second.
const signWait = 3 * time.Second

// awaitSigned waits until what is recorded by now is signed, and returns how
// many events are not. A server that does not tell is taken at its checkpoint.
func (cl *client) awaitSigned(ctx context.Context) (unsigned int64, err error) {
	var s admin.Status
	if cl.getJSON(ctx, "/api/v1/status", nil, &s) != nil {
		return 0, nil // the log is public, the status may not be
	}
	want := s.Log.Size
	for deadline := time.Now().Add(signWait); s.Log.SignedSize < want && time.Now().Before(deadline); {
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
		if err := cl.getJSON(ctx, "/api/v1/status", nil, &s); err != nil {
			return 0, err
		}
	}
	return max(0, want-s.Log.SignedSize), nil
}

// verifier reads the log's verifier from a file or, failing that, asks the
// server for it.
func (cl *client) verifier(c *cobra.Command, file string) (note.Verifier, error) {
	var vkey []byte
	var err error
	if file != "" {
		if vkey, err = os.ReadFile(file); err != nil {
			return nil, usage(err)
		}
	} else {
		if vkey, err = cl.get(c.Context(), "/log/vkey", nil); err != nil {
			return nil, err
		}
		fmt.Fprintln(c.ErrOrStderr(), "tidemark: the verifier is the server's own word; use --vkey with a copy that you keep")
	}
	return parseVerifier(vkey)
}

func parseVerifier(vkey []byte) (note.Verifier, error) {
	v, err := note.NewVerifier(strings.TrimSpace(string(vkey)))
	if err != nil {
		return nil, usage(fmt.Errorf("verifier %.100q: %w", vkey, err))
	}
	return v, nil
}

func printReport(c *cobra.Command, r audit.Report) {
	w := c.OutOrStdout()
	for _, p := range r.Problems {
		switch {
		case p.Index >= 0 && p.Ref != "":
			fmt.Fprintf(w, "entry %d  %s  %s\n", p.Index, p.Ref, p.What)
		case p.Index >= 0:
			fmt.Fprintf(w, "entry %d  %s\n", p.Index, p.What)
		default:
			fmt.Fprintln(w, p.What)
		}
	}
	if len(r.Problems) > 0 {
		return
	}
	fmt.Fprintf(w, "consistent, %d events of %d tags\n  log   %s\n  root  %v\n", r.Size, r.Refs, r.Origin, r.Root)
	if r.Since > 0 {
		fmt.Fprintf(w, "  contains the %d events that were signed before\n", r.Since)
	}
}
