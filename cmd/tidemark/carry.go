package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"golang.org/x/mod/sumdb/note"

	"tidemark/audit/bundle"
	"tidemark/proxy/admin"
	"tidemark/proxy/carry"
)

func newExport() *cobra.Command {
	var out, since string
	var files, platforms []string
	c := &cobra.Command{
		Use:   "export -o FILE REF...",
		Short: "Pack images, their history and its proof for a place without network",
		Long: `Pack what tags mean into one tar for a place without network: the images that
clients of this server are given, with what refers to them, the events of their
tags with proofs that they are in the log, and a signed list of all of it. It is an
OCI image layout, too: skopeo copy oci-archive:FILE:REF reads it.

Only what is here whole is exported: tidemark warm makes it so. With --since the
bundle holds what has changed since an earlier one, or since an entry of the log;
who imports it must have the rest.`,
		Example: `  tidemark export -o monday.tar nginx:1.27 alpine
  tidemark export -o all.tar -f images.txt --platform linux/amd64
  tidemark export -o tuesday.tar --since monday.tar nginx:1.27 alpine`,
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().StringVarP(&out, "output", "o", "", "file to write; - is standard output")
	c.Flags().StringArrayVarP(&files, "file", "f", nil, "file that names images: a list, a compose file or Kubernetes manifests; - is standard input")
	c.Flags().StringSliceVar(&platforms, "platform", nil, "only the images of this platform, such as linux/amd64; several with commas")
	c.Flags().StringVar(&since, "since", "", "bundle that the receiver has, or index of the entry up to which it has everything")
	c.RunE = func(c *cobra.Command, args []string) error {
		if out == "" {
			return usage(errors.New("-o is needed: the file to write the bundle to"))
		}
		if out == since {
			return usage(errors.New("-o and --since are the same file: a delta would replace what it goes on from"))
		}
		refs, err := taggedRefs(c, args, files)
		if err != nil {
			return err
		}
		vkey, err := cl.get(c.Context(), "/log/vkey", nil)
		if err != nil {
			return err
		}
		verifier, err := parseVerifier(vkey)
		if err != nil {
			return err
		}
		q := admin.ExportRequest{Refs: refs, Platforms: platforms}
		if since != "" {
			if q.Since, err = exportSince(since, verifier); err != nil {
				return err
			}
		}
		if out == "-" {
			return cl.export(c, q, c.OutOrStdout())
		}
		if err := cl.exportFile(c, q, out); err != nil {
			return err
		}
		return reportBundle(c, out, verifier, strings.TrimSpace(string(vkey)), *asJSON)
	}
	return c
}

// taggedRefs are the refs of arguments and files, all of which have a tag.
func taggedRefs(c *cobra.Command, args, files []string) ([]string, error) {
	named, err := namedImages(c, args, files)
	if err != nil {
		return nil, err
	}
	for _, ref := range named {
		if strings.Contains(ref, "@") {
			return nil, usage(fmt.Errorf("%s names a digest; the ledger, which goes with the images, is about tags", ref))
		}
	}
	return named, nil
}

// exportSince reads what --since names: a bundle, or an index.
func exportSince(since string, verifier note.Verifier) (*admin.ExportSince, error) {
	if n, err := strconv.ParseInt(since, 10, 64); err == nil {
		if n < 0 {
			return nil, usage(fmt.Errorf("--since %d is no index of an entry", n))
		}
		return &admin.ExportSince{LogSize: n + 1}, nil
	}
	f, err := os.Open(since)
	if err != nil {
		return nil, usage(fmt.Errorf("--since is neither an index nor a bundle: %w", err))
	}
	defer f.Close()
	list, err := bundle.ReadContents(f, func(vkey string) (note.Verifier, error) {
		v, err := note.NewVerifier(vkey)
		if err == nil && (v.Name() != verifier.Name() || v.KeyHash() != verifier.KeyHash()) {
			err = fmt.Errorf("it is of the log %s, this server's is %s: a delta goes on from a bundle of the same log", v.Name(), verifier.Name())
		}
		return verifier, err
	})
	if err != nil {
		return nil, fmt.Errorf("--since %s: %w", since, err)
	}
	s := &admin.ExportSince{Bundle: list.ID(), LogSize: list.LogSize}
	for _, im := range list.Images {
		s.Refs = append(s.Refs, im.Ref)
	}
	for _, blobs := range [][]bundle.Blob{list.Manifests, list.Blobs, list.Omitted} {
		for _, b := range blobs {
			s.Content = append(s.Content, b.Digest)
		}
	}
	return s, nil
}

// exportFile writes a bundle to a file, which is there whole or not at all. What is
// left behind by an export that was killed is written over by the next.
func (cl *client) exportFile(c *cobra.Command, q admin.ExportRequest, path string) error {
	part := path + ".part"
	f, err := os.OpenFile(part, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return usage(err)
	}
	err = cl.export(c, q, f)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		return os.Rename(part, path)
	}
	return errors.Join(err, os.Remove(part))
}

func (cl *client) export(c *cobra.Command, q admin.ExportRequest, w io.Writer) error {
	body, err := json.Marshal(q)
	if err != nil {
		return err
	}
	resp, err := cl.open(c.Context(), http.MethodPost, strings.TrimSuffix(cl.server, "/")+"/api/v1/export", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	bar := newTransfer(c.ErrOrStderr(), "export", 0)
	defer bar.Close()
	if _, err := io.CopyBuffer(struct{ io.Writer }{w}, bar.Reader(resp.Body), make([]byte, 1<<20)); err != nil {
		return fmt.Errorf("the server stopped in the middle; its log says why: %w", err)
	}
	return nil
}

// reportBundle prints what is in a bundle that has just been written, and by which key it
// is signed.
func reportBundle(c *cobra.Command, path string, verifier note.Verifier, vkey string, asJSON bool) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	list, err := bundle.ReadContents(f, func(string) (note.Verifier, error) { return verifier, nil })
	if err != nil {
		return fmt.Errorf("what was written cannot be read: %w", err)
	}
	if asJSON {
		return printJSON(c, bundleReport(list))
	}
	printBundle(c.OutOrStdout(), list)
	fmt.Fprintf(c.OutOrStdout(), "\nWho imports it for the first time needs the key of this log, by another way than the bundle's:\n  tidemark import %s --trust '%s'\n", path, vkey)
	return nil
}

// A BundleReport is what export and verify print of a bundle as JSON.
type BundleReport struct {
	Bundle  digest.Digest  `json:"bundle"`
	Origin  string         `json:"origin"`
	LogSize int64          `json:"log_size"`
	Base    *bundle.Base   `json:"base,omitempty"`
	Events  int64          `json:"events"`
	Blobs   int            `json:"blobs"`
	Bytes   int64          `json:"bytes"` // of content
	Images  []bundle.Image `json:"images"`
}

func bundleReport(list bundle.Contents) BundleReport {
	r := BundleReport{
		Bundle: list.ID(), Origin: list.Origin, LogSize: list.LogSize, Base: list.Base, Events: list.Events.Count,
		Blobs: len(list.Manifests) + len(list.Blobs), Images: list.Images,
	}
	for _, blobs := range [][]bundle.Blob{list.Manifests, list.Blobs} {
		for _, b := range blobs {
			r.Bytes += b.Size
		}
	}
	return r
}

func printBundle(w io.Writer, list bundle.Contents) {
	r := bundleReport(list)
	fmt.Fprintf(w, "bundle %s\n  log      %s at %d entries\n", r.Bundle, r.Origin, r.LogSize)
	if b := r.Base; b != nil {
		what := fmt.Sprintf("what is known at %d entries", b.LogSize)
		if b.Bundle != "" {
			what = "bundle " + b.Bundle.String()
		}
		fmt.Fprintf(w, "  delta to %s; %d pieces of content are left out\n", what, len(list.Omitted))
	}
	fmt.Fprintf(w, "  content  %s in %d pieces\n  events   %d\n", human(r.Bytes), r.Blobs, r.Events)
	for _, im := range r.Images {
		platforms := "all platforms"
		if len(im.Platforms) > 0 {
			platforms = strings.Join(im.Platforms, " ")
		}
		fmt.Fprintf(w, "  %s  %s  %s\n", im.Ref, short(im.Digest), platforms)
	}
}

func newImport() *cobra.Command {
	var trust string
	c := &cobra.Command{
		Use:   "import FILE",
		Short: "Take in a bundle that export packed",
		Long: `Take in a bundle that export packed elsewhere. Everything in it is verified before
anything becomes visible: bytes, completeness, the chain of every tag, the proofs,
and the signature of the list by a key that is trusted. That is the one by which
bundles of the same log came before or, the first time, the one of --trust.

It can be called again whenever it was interrupted, and goes on then; importing the
same bundle twice changes nothing.`,
		Example: `  tidemark import monday.tar --trust log.vkey
  tidemark import tuesday.tar
  tidemark import - < wednesday.tar`,
		Args: cobra.ExactArgs(1),
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().StringVar(&trust, "trust", "", "verifier key of the log that the bundle must be of, or a file that holds it")
	c.RunE = func(c *cobra.Command, args []string) error {
		q := url.Values{}
		if trust != "" {
			vkey, err := trustedKey(trust)
			if err != nil {
				return err
			}
			q.Set("trust", vkey)
		}
		in, size := c.InOrStdin(), int64(0)
		if args[0] != "-" {
			f, err := os.Open(args[0])
			if err != nil {
				return usage(err)
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil {
				return err
			}
			in, size = f, info.Size()
		}
		report, err := cl.importBundle(c, in, size, q)
		if err != nil {
			return fmt.Errorf("%s was not imported: %w", args[0], err)
		}
		if *asJSON {
			return printJSON(c, report)
		}
		printImport(c.OutOrStdout(), report)
		return nil
	}
	return c
}

// trustedKey reads a key, or the file that holds it.
func trustedKey(s string) (string, error) {
	if _, err := note.NewVerifier(s); err == nil {
		return s, nil
	}
	b, err := os.ReadFile(s)
	if err != nil {
		return "", usage(fmt.Errorf("--trust is neither a key nor a file that holds one: %w", err))
	}
	if _, err := parseVerifier(b); err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}

func (cl *client) importBundle(c *cobra.Command, in io.Reader, size int64, q url.Values) (report admin.ImportReport, err error) {
	bar := newTransfer(c.ErrOrStderr(), "import", size)
	defer bar.Close()
	address := strings.TrimSuffix(cl.server, "/") + "/api/v1/import?" + q.Encode()
	resp, err := cl.send(c.Context(), http.MethodPost, address, "application/x-tar", bar.Reader(in))
	if err != nil {
		return report, err
	}
	defer resp.Body.Close()
	return report, json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&report)
}

func printImport(w io.Writer, r admin.ImportReport) {
	already := ""
	if r.Already {
		already = ", which had been imported already"
	}
	fmt.Fprintf(w, "bundle %s%s\n  log      %s at %d entries\n", r.Bundle, already, r.Origin, r.LogSize)
	for _, ref := range r.Refs {
		fmt.Fprintf(w, "  %-5s  %s  %s\n", ref.Became, ref.Ref, short(ref.Digest))
	}
}

// verifyBundle checks a whole bundle.
func verifyBundle(c *cobra.Command, path, vkeyFile string, asJSON bool) error {
	var trusted note.Verifier
	if vkeyFile != "" {
		vkey, err := os.ReadFile(vkeyFile)
		if err != nil {
			return usage(err)
		}
		if trusted, err = parseVerifier(vkey); err != nil {
			return err
		}
	}
	list, err := readBundle(c.Context(), path, func(vkey string) (note.Verifier, error) {
		own, err := note.NewVerifier(vkey)
		switch {
		case err != nil:
			return nil, err
		case trusted == nil:
			fmt.Fprintln(c.ErrOrStderr(), "tidemark: the verifier is the bundle's own word; use --vkey with a copy that you keep")
			return own, nil
		case own.Name() != trusted.Name() || own.KeyHash() != trusted.KeyHash():
			return nil, &exitError{exitWrong, fmt.Errorf("the bundle is signed by %s, not by the key of --vkey", vkey)}
		}
		return trusted, nil
	})
	if wrong := (*bundle.WrongError)(nil); errors.As(err, &wrong) {
		return &exitError{exitWrong, fmt.Errorf("%s is not what it should be: %w", path, err)}
	}
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(c, bundleReport(list))
	}
	fmt.Fprintln(c.OutOrStdout(), "complete and consistent: every byte, every proof and the signature")
	printBundle(c.OutOrStdout(), list)
	return nil
}

func readBundle(ctx context.Context, path string, verifier func(string) (note.Verifier, error)) (bundle.Contents, error) {
	f, err := os.Open(path)
	if err != nil {
		return bundle.Contents{}, usage(err)
	}
	defer f.Close()
	return bundle.Read(ctx, f, bundle.Checks{Verifier: verifier, Describe: carry.Describe})
}
