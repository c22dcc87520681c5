package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// processes are the components of a node. When one ends, the node ends, as k3s does.
type processes struct {
	started []*process
	ended   chan error
}

type process struct {
	command *exec.Cmd
	done    chan struct{}
}

func newProcesses() *processes { return &processes{ended: make(chan error, 16)} }

// start runs a component, whose output goes where the node's own goes.
func (p *processes) start(name string, arguments ...string) error {
	return p.startInto(os.Stderr, name, arguments...)
}

func (p *processes) startInto(output io.Writer, name string, arguments ...string) error {
	command := exec.Command(components+name, arguments...)
	command.Stdout, command.Stderr = output, output
	// A component never outlives a k3s that was killed.
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := command.Start(); err != nil {
		return err
	}
	one := &process{command, make(chan struct{})}
	p.started = append(p.started, one)
	go func() {
		err := command.Wait()
		close(one.done)
		p.ended <- fmt.Errorf("%s exited: %v", name, err)
	}()
	return nil
}

// wait returns when a component ends or the node is told to; the components are stopped then, those
// that others need last.
func (p *processes) wait(ctx context.Context) error {
	var err error
	select {
	case <-ctx.Done():
		say("info", "Shutdown request received")
	case err = <-p.ended:
	}
	for i := len(p.started) - 1; i >= 0; i-- {
		one := p.started[i]
		one.command.Process.Signal(syscall.SIGTERM)
		patience := 500 * time.Millisecond
		if filepath.Base(one.command.Path) == "kine" || filepath.Base(one.command.Path) == "etcd" {
			patience = 5 * time.Second
		}
		select {
		case <-one.done:
		case <-time.After(patience):
			one.command.Process.Kill()
			<-one.done
		}
	}
	return err
}

// supervise runs what begin starts until one of it ends, begin fails, or the node is told to stop.
func supervise(ctx context.Context, begin func(context.Context, *processes) error) error {
	running := newProcesses()
	failed := make(chan error, 1)
	work, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		if err := begin(work, running); err != nil && work.Err() == nil {
			failed <- err
			cancel()
		}
	}()
	ended := running.wait(work)
	select {
	case err := <-failed:
		return err
	default:
		return ended
	}
}
