// Command tidemark is a registry mirror that remembers: it serves every pull
// from one disk after the first, and keeps a ledger of what every tag meant.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes. Scripts rely on them.
const (
	exitFailed = 1 // it did not work
	exitUsage  = 2 // wrong usage or configuration
	exitWrong  = 3 // a verification found something wrong
)

// An exitError is an error with an exit code of its own.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func usage(err error) error { return &exitError{exitUsage, err} }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal does not wait for the drain
	err := newRoot().ExecuteContext(ctx)
	stop()
	os.Exit(report(err))
}

// report tells the user what went wrong, and returns the exit code.
func report(err error) int {
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, "tidemark:", err)
	var ee *exitError
	if errors.As(err, &ee) {
		return ee.code
	}
	return exitFailed
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "tidemark",
		Short: "A registry mirror that remembers",
		Long: `tidemark is a registry mirror that remembers.

Point Docker, containerd, podman or BuildKit at it: every pull of every registry
is served from one disk after the first, and a ledger that anyone can verify
keeps which digest every tag meant, and when it moved.`,
		Example: `  tidemark serve                        # with no configuration at all
  tidemark setup docker                 # what to write into Docker's configuration
  tidemark log nginx:1.27               # when it moved, and to what`,
		Args:          cobra.NoArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	root.AddCommand(newServe(), newCheck(), newSetup(), newTags(), newLog(), newShow(), newDiff(),
		newHold(), newApprove(), newReject(), newRelease(), newPolicy(), newExposure(), newNotify(), newVerify(),
		newWarm(), newExport(), newImport(), newLock(), newBackfill(), newDoctor(), newCache(), newVersion())
	wrapArgs(root)
	return root
}

// wrapArgs makes wrong arguments a wrong usage.
func wrapArgs(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return usage(fmt.Errorf("%w\n\nusage: %s", err, c.UseLine()))
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		wrapArgs(sub)
	}
}

func newVersion() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: "  tidemark version --json",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if asJSON {
				return printJSON(c, map[string]string{"version": version(), "go": goVersion()})
			}
			c.Println("tidemark", version(), goVersion())
			return nil
		},
	}
	c.SetOut(os.Stdout)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// release is set by the linker when a release is built.
var release string

// version is the release, or what the Go toolchain knows of the source.
func version() string {
	if release != "" {
		return release
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return "dev-" + s.Value[:min(12, len(s.Value))]
		}
	}
	return "dev"
}

func goVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.GoVersion
	}
	return "unknown"
}
