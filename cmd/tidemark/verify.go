package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"filippo.io/torchwood"
	"github.com/spf13/cobra"
	"golang.org/x/mod/sumdb/note"

	"tidemark/audit"
	"tidemark/proxy/admin"
)

func newVerify() *cobra.Command {
	var vkeyFile, sinceFile, saveFile string
	c := &cobra.Command{
		Use:   "verify",
		Short: "Re-check the whole ledger: signature, tree, and the chain of every tag",
		Long: `Re-check the whole ledger of a server: the signature of its checkpoint, every
entry against the signed tree, and for every tag that each event begins where
the one before ended. Exit code 3 if anything is off.

Without --vkey the server is asked for its verifier, which proves that the log
is consistent, but not that it is the log you know: keep log.vkey, and the
checkpoints that --save writes, somewhere else.`,
		Example: `  tidemark verify
  tidemark verify --vkey log.vkey --since last.checkpoint --save last.checkpoint`,
		Args: cobra.NoArgs,
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().StringVar(&vkeyFile, "vkey", "", "file with the log's verifier (log.vkey)")
	c.Flags().StringVar(&sinceFile, "since", "", "checkpoint saved earlier, which the log must contain")
	c.Flags().StringVar(&saveFile, "save", "", "file to save the checkpoint to if all is well")
	c.RunE = func(c *cobra.Command, _ []string) error {
		ctx := c.Context()
		var since []byte
		if sinceFile != "" {
			var err error
			if since, err = os.ReadFile(sinceFile); err != nil {
				return usage(err)
			}
		}
		verifier, err := cl.verifier(c, vkeyFile)
		if err != nil {
			return err
		}
		unsigned, err := cl.awaitSigned(ctx)
		if err != nil {
			return err
		}
		checkpoint, err := cl.get(ctx, "/log/checkpoint", nil)
		if err != nil {
			return err
		}
		tiles, err := torchwood.NewTileFetcher(strings.TrimSuffix(cl.server, "/")+"/log", torchwood.WithUserAgent("tidemark/"+version()))
		if err != nil {
			return usage(err)
		}
		report, err := audit.Verify(ctx, tiles, checkpoint, since, verifier)
		if err != nil {
			return err
		}
		if *asJSON {
			if err := printJSON(c, report); err != nil {
				return err
			}
		} else {
			printReport(c, report)
			if unsigned > 0 {
				fmt.Fprintf(c.OutOrStdout(), "  %d newer events are not signed yet and were not checked\n", unsigned)
			}
		}
		if n := len(report.Problems); n > 0 {
			return &exitError{exitWrong, fmt.Errorf("the ledger is not what it should be: %d problems", n)}
		}
		if saveFile != "" {
			return os.WriteFile(saveFile, checkpoint, 0o644)
		}
		return nil
	}
	return c
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
