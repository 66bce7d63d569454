assign q = 0;
initial forever $display("x");
endmodule
